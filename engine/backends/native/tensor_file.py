"""Named tensors in a file that is mapped into memory: read at once, shared by processes, whole or refused.

The tensors come one after the other, each at a multiple of 64 bytes, then a table of contents as JSON, then
that table's length and a magic number. A file whose checksums do not agree is refused.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

_ALIGNMENT = 64  # of the kernels' vectors
_TAIL = struct.Struct("<QI8s")  # length and checksum of the table, magic
_MAGIC = b"gorgon01"
_DTYPES = {str(dtype): dtype for dtype in (torch.uint8, torch.bfloat16, torch.float32)}


def write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Whole or not at all. tensors: on the CPU, none of them empty, uint8, bfloat16 or float32. Raises
    OSError; what was written until then lies under the name with ".partial"."""
    partial = path.with_name(f"{path.name}.partial")
    table = {}
    with partial.open("wb") as file:
        for name, tensor in tensors.items():
            file.write(bytes(-file.tell() % _ALIGNMENT))
            data = tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data
            table[name] = [file.tell(), str(tensor.dtype), list(tensor.shape), zlib.crc32(data)]
            file.write(data)
        contents = json.dumps(table).encode()
        file.write(contents + _TAIL.pack(len(contents), zlib.crc32(contents), _MAGIC))
    os.replace(partial, path)


def read(path: Path) -> dict[str, Tensor]:
    """The tensors, which nobody may write to. Raises OSError, ValueError where the file is damaged."""
    with path.open("rb") as file:
        # A private mapping: torch wants memory that could be written to.
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    end = len(data) - _TAIL.size
    if end < 0:
        raise ValueError("it is too short")
    length, checksum, magic = _TAIL.unpack_from(data, end)
    contents = data[max(end - length, 0) : end]
    if magic != _MAGIC or zlib.crc32(contents) != checksum:
        raise ValueError("its table of contents is damaged")
    tensors = {}
    with memoryview(data) as view:
        for name, (start, dtype_name, shape, expected) in json.loads(contents).items():
            dtype = _DTYPES[dtype_name]
            count = torch.Size(shape).numel()
            if zlib.crc32(view[start : start + count * dtype.itemsize]) != expected:
                raise ValueError(f"{name} is damaged")
            tensors[name] = torch.frombuffer(data, dtype=dtype, count=count, offset=start).view(shape)
    return tensors
