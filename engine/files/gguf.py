"""Reads GGUF files: metadata, and tensors dequantized one at a time. Without torch, because the tokenizer
of such a file is read in the server process. The gguf package's own reader takes seconds on a vocabulary.
"""

from __future__ import annotations

import mmap
import re
import struct
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import ModelError
from engine.files.reading import refuse_pointer

# value type number -> struct format; 8 is a string, 9 an array
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_DEFAULT_ALIGNMENT = 32
_SPLIT = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True)
class _TensorEntry:
    shape: tuple[int, ...]  # rows first, as in torch
    kind: int
    offset: int  # bytes from the start of `data`
    data: mmap.mmap


@dataclass(frozen=True, eq=False)
class GGUFFile:
    """One open GGUF file, or all files of a split one. `metadata` are Python scalars, strings and lists."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, _TensorEntry]

    def tensor(self, name: str) -> NDArray[np.float32]:
        """One tensor as float32, in its own shape. Raises ModelError where its format is unknown."""
        # Not at the top: the server needs the file's head alone, and so does an engine that has kept weights.
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
        from gguf.quants import dequantize

        entry = self.tensors[name]
        try:
            kind = GGMLQuantizationType(entry.kind)
            block, block_bytes = GGML_QUANT_SIZES[kind]
            *rows, columns = entry.shape
            stored = (*rows, columns // block * block_bytes)
            raw = np.ndarray(stored, dtype=np.uint8, buffer=entry.data, offset=entry.offset)
            if kind == GGMLQuantizationType.F32:
                return raw.view(np.float32).reshape(entry.shape).copy()
            if kind == GGMLQuantizationType.F16:
                return raw.view(np.float16).reshape(entry.shape).astype(np.float32)
            values: NDArray[np.float32] = dequantize(raw, kind)
            return values.reshape(entry.shape)
        except (ArithmeticError, ValueError, KeyError, TypeError, NotImplementedError) as error:
            raise ModelError(f"{self.path.name}: tensor {name} cannot be read: {error}") from error


def find_gguf(model_dir: Path) -> Path | None:
    """The folder's GGUF file, the first of a split one, or None where the folder has safetensors or no GGUF.

    A config.json beside a GGUF file is not read. Raises ModelError where it is not clear which file is meant.
    """
    files = sorted(model_dir.glob("*.gguf"))
    if not files or ((model_dir / "config.json").exists() and any(model_dir.glob("*.safetensors"))):
        return None
    parts = split_parts(files[0])
    if set(files) <= set(parts):
        return parts[0]
    names = ", ".join(file.name for file in files)
    raise ModelError(f"{model_dir} holds more than one GGUF file ({names}); leave one, or the parts of one")


def split_parts(path: Path) -> list[Path]:
    """All files of the split file that `path` is a part of, in order; else itself alone."""
    found = _SPLIT.fullmatch(path.name)
    if found is None:
        return [path]
    count = int(found["count"])
    return [path.with_name(f"{found['stem']}-{n:05d}-of-{count:05d}.gguf") for n in range(1, count + 1)]


def open_gguf(path: Path) -> GGUFFile:
    """Open a GGUF file, version 2 or 3, and all parts of a split one. The same unchanged files are parsed
    once. Raises ModelError."""
    parts = split_parts(path)
    missing = [part.name for part in parts if not part.exists()]
    if missing:
        raise ModelError(
            f"{path.name} is a part of a split GGUF file of which {len(missing)} are missing: {missing[0]}"
        )
    return _open(tuple((part, part.stat().st_mtime_ns) for part in parts))


@cache
def _open(parts: tuple[tuple[Path, int], ...]) -> GGUFFile:
    """`parts` are files with their times of modification, the one with the metadata first."""
    files = [_open_part(path) for path, _ in parts]
    tensors = {name: entry for file in files for name, entry in file.tensors.items()}
    whole = files[0].metadata.get("split.tensors.count", len(tensors))
    if len(files) > 1 and whole != len(tensors):
        raise ModelError(f"{files[0].path.name} and its other parts hold {len(tensors)} tensors, not {whole}")
    return GGUFFile(files[0].path, files[0].metadata, tensors)


def _open_part(path: Path) -> GGUFFile:
    refuse_pointer(path)
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return _Header(data).read(path)
    except (OSError, struct.error, ValueError, TypeError, LookupError, ArithmeticError) as error:
        raise ModelError(f"{path.name} is not a readable GGUF file: {error}") from error


class _Header:
    """A cursor over the head of the file."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0

    def read(self, path: Path) -> GGUFFile:
        magic, version, num_tensors, num_keys = self.unpack("4sIQQ")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"magic {magic!r}, version {version}")
        metadata = {self.string(): self.value(self.scalar("I")) for _ in range(num_keys)}
        heads = []  # of the tensors: name, shape, kind, offset from where the data start
        for _ in range(num_tensors):
            name = self.string()
            shape = self.unpack(f"{self.scalar('I')}Q")[::-1]
            heads.append((name, shape, *self.unpack("IQ")))
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        start = -(-self.at // alignment) * alignment
        tensors = {
            name: _TensorEntry(shape, kind, start + offset, self.data) for name, shape, kind, offset in heads
        }
        return GGUFFile(path, metadata, tensors)

    def unpack(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from("<" + layout, self.data, self.at)
        self.at += struct.calcsize("<" + layout)
        return values

    def scalar(self, layout: str) -> Any:
        return self.unpack(layout)[0]

    def string(self) -> str:
        size = self.scalar("Q")
        if size > len(self.data) - self.at:
            raise ValueError("a string runs past the end of the file")
        self.at += size
        return self.data[self.at - size : self.at].decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.scalar(_SCALARS[kind])
        item, count = self.unpack("IQ")
        if count > len(self.data):
            raise ValueError("an array runs past the end of the file")
        if item in _SCALARS:
            return list(self.unpack(f"{count}{_SCALARS[item]}"))
        if item != _STRING:
            raise ValueError(f"an array of values of type {item}")
        return self.strings(count)

    def strings(self, count: int) -> list[str]:
        """The same as calling `string` for each, but fast: a vocabulary has hundreds of thousands."""
        data, at, size_at, found = self.data, self.at, struct.Struct("<Q").unpack_from, []
        for _ in range(count):
            [size] = size_at(data, at)
            end = at + 8 + size
            if end > len(data):
                raise ValueError("a string runs past the end of the file")
            found.append(data[at + 8 : end].decode("utf-8", errors="replace"))
            at = end
        self.at = at
        return found
