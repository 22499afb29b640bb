"""Foreign checkpoint files: finds them in a folder, names their tensors and reads a tensor when it is needed.

Heads may lie in one file with a base model of many gigabytes, so nothing is read ahead. Pickles are always
opened with `weights_only=True`.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from heads.errors import HeadsError

# The heads' own files first: a folder may hold the base beside them.
_CANDIDATES = (
    "medusa_lm_head.safetensors",
    "medusa_lm_head.pt",
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "rank0.safetensors",
)
_PICKLES = (".pt", ".bin", ".pth")
FILE_PATTERNS = ("config.json", "*.safetensors", "*.index.json", "medusa_lm_head.pt", "pytorch_model*.bin")


class ForeignCheckpoint:
    """The tensors of a file or of its shards by key, and what config.json beside it says ({} without one)."""

    def __init__(self, source: Path) -> None:
        """Raises HeadsError where there is no checkpoint or a file of it cannot be read."""
        self.path = _find(source)
        self.config = _read_json(self.path.parent / "config.json", {})
        self._readers = {path: _open(path) for path in _shards(self.path)}
        self._files: dict[str, Path] = {}
        for path, reader in self._readers.items():
            for key in reader.keys():  # noqa: SIM118  (safe_open is no mapping)
                if key in self._files:
                    raise HeadsError(f"{path}: {key!r} is in {self._files[key].name} as well")
                self._files[key] = path

    def keys(self) -> list[str]:
        return list(self._files)

    def file(self, key: str) -> Path:
        """The file that holds a key."""
        return self._files[key]

    def read(self, key: str) -> Tensor:
        """One tensor, on the CPU. Raises HeadsError where the file does not hold it after all."""
        reader = self._readers[self._files[key]]
        try:
            tensor = reader[key] if isinstance(reader, dict) else reader.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise HeadsError(f"{self._files[key]} is damaged or truncated: {error}") from error
        # Pickles may also hold sparse tensors and tensors without memory.
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise HeadsError(f"{self._files[key]}: {key!r} is a {type(tensor).__name__}, but no dense tensor")
        return tensor


def _find(source: Path) -> Path:
    if source.is_file():
        return source
    if not source.is_dir():
        raise HeadsError(f"{source} is no file and no folder")
    if (source / "heads.safetensors").exists():
        raise HeadsError(f"{source} is a head set of ours already; serve it with --heads {source}")
    if (source / "rank1.safetensors").exists():
        raise HeadsError(
            f"{source}: rank1.safetensors holds a part of the heads; convert them anew with --tp_size 1"
        )
    for name in _CANDIDATES:
        if (source / name).is_file():
            return source / name
    raise HeadsError(f"{source} holds no head checkpoint: none of {', '.join(_CANDIDATES)}; name the file")


def _shards(path: Path) -> list[Path]:
    if not path.name.endswith(".index.json"):
        return [path]
    weight_map = _read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise HeadsError(f"{path}: 'weight_map' is missing or does not name files")
    # Shards lie beside their index. A path to another folder is refused.
    return [path.parent / Path(name).name for name in sorted(set(weight_map.values()))]


def _read_json(path: Path, default: dict[str, Any] | None = None) -> dict[str, Any]:
    if default is not None and not path.exists():
        return default
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise HeadsError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise HeadsError(f"{path} must hold an object")
    return content


def _open(path: Path) -> Any:
    """What reads a file: safetensors' handle, or the mapping a pickle holds."""
    try:
        if path.suffix in _PICKLES:
            return _open_pickle(path)
        return safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise HeadsError(f"{path} is missing; fetch the checkpoint anew") from error
    except (SafetensorError, OSError, EOFError) as error:
        raise HeadsError(f"{path} is damaged or truncated: {error}; fetch it anew") from error


def _open_pickle(path: Path) -> dict[str, Any]:
    zipped = zipfile.is_zipfile(path)
    with path.open("rb") as file:
        if file.read(2) == b"PK" and not zipped:  # the zip's directory at its end is missing
            raise EOFError("its end is missing")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        raise HeadsError(
            f"{path} is damaged or holds more than tensors, such as code that opening it would run. It was "
            "not opened; ask its authors for safetensors"
        ) from error
    except Exception as error:  # a damaged pickle may raise anything
        raise HeadsError(
            f"{path} is damaged or truncated ({type(error).__name__}: {error}); fetch it anew"
        ) from error
    if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
        raise HeadsError(f"{path} holds a {type(content).__name__}, but should map names to tensors")
    return dict(content)
