"""Pushes head sets to a hub repository or a folder, and fetches them: a head set's own files, nothing
else."""

from __future__ import annotations

import shutil
from pathlib import Path

from heads.errors import RegistryError
from heads.registry import hub
from heads.registry.cache import expand_user
from heads.registry.names import fetch_head_files, is_hub_id

# Listed by name, because training keeps other safetensors beside them.
_FILES = ("config.json", "heads.safetensors", "tree.json", "README.md")


def push_heads(directory: Path, target: str) -> str:
    """Copy a head set to the hub repository or folder `target`; returns where it is now.

    The repository is made, private, where there is none. Raises RegistryError.
    """
    if not is_hub_id(target):
        folder = expand_user(target)
        copy_heads(directory, folder)
        return str(folder)
    return hub.upload(directory, target, _FILES)


def fetch_heads(repository: str) -> Path:
    """The folder of a head set: `repository` itself where it is one, otherwise the hub's in its own cache.

    Raises RegistryError.
    """
    if is_hub_id(repository):
        return fetch_head_files(repository)
    folder = expand_user(repository)
    if not folder.is_dir():
        raise RegistryError(f"{repository!r} is no hub id like org/name and no folder")
    return folder


def copy_heads(source: Path, target: Path) -> None:
    """Copy a head set's files from folder to folder. Raises RegistryError."""
    if target.exists() and not target.is_dir():
        raise RegistryError(f"{target} is a file; name a folder")
    if target.is_dir() and source.resolve() == target.resolve():
        raise RegistryError(f"{target} is where the head set lies already")
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name in _FILES:
            if (source / name).is_file():  # the card may be missing
                shutil.copyfile(source / name, target / name)
    except OSError as error:
        raise RegistryError(f"{target} cannot be written: {error}") from error
