"""Reads the files of a model folder as they are found: with a byte order mark, or as pointers of Git LFS."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from engine.errors import ModelError

ADAPTER = "is an adapter, no whole model; merge it into its base with peft's merge_and_unload and save that"
_LFS = b"version https://git-lfs"


def refuse_pointer(path: Path) -> None:
    """Raises ModelError where `path` is what Git LFS puts in the place of a file that was not fetched."""
    try:
        with path.open("rb") as file:
            pointer = file.read(len(_LFS)) == _LFS
    except OSError:  # for the reader to tell
        return
    if pointer:
        raise ModelError(
            f"{path} is a Git LFS pointer and not the file itself; run git lfs pull in its folder"
        )


def read_text(path: Path) -> str:
    """A text file in UTF-8, with or without a byte order mark. Raises ModelError."""
    refuse_pointer(path)
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A file's JSON object, empty where there is no file. Raises ModelError."""
    if not path.exists():
        return {}
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds no JSON object")
    return content
