"""Names for what is kept between starts. They change with the model's files and with our code."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

_ENGINE = Path(__file__).parent.parent
_MODEL_FILES = ("*.safetensors", "*.gguf", "*.json")


def digest(*parts: object) -> str:
    """Sixteen letters that change with any of the parts, as `repr` has them."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def files_of(folder: Path) -> list[tuple[str, int, int, int]]:
    """Name, size and times of each file of a model or a head set.

    The time of a file's content is not enough: images and archives may set it to one date for all files. So
    the time of the file as it lies here counts, too.
    """
    paths = sorted(path for pattern in _MODEL_FILES for path in folder.glob(pattern))
    facts = [(path.name, path.stat()) for path in paths]
    return [(name, found.st_size, found.st_mtime_ns, found.st_ctime_ns) for name, found in facts]


@functools.cache
def code_of(*parts: str) -> str:
    """Digest of our own sources under these folders of the engine."""
    total = hashlib.sha256()
    paths = (path for part in parts for path in sorted((_ENGINE / part).rglob("*")))
    for path in paths:
        if path.suffix in (".py", ".c", ".h"):
            total.update(path.read_bytes())
    return total.hexdigest()[:16]
