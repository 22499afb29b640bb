"""Compiles the kernels on the machine they run on, once, into the cache folder. It takes about a second."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from heads.errors import RegistryError
from heads.registry.cache import writable_cache

logger = logging.getLogger(__name__)

_SOURCES = Path(__file__).parent / "kernels"
_MAIN = _SOURCES / "kernels.c"
# No -ffast-math: sums must come in the order in which they are written.
_COMPILE = (
    "-O2",
    "-march=native",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-pthread",
    "-fPIC",
    "-std=gnu11",
    "-c",
)
_SECONDS = 120


@functools.cache
def load() -> ctypes.CDLL | None:
    """The kernels, or None where the CPU lacks what they need or nothing can compile them."""
    if not _cpu_fits():
        return None
    compiler = _compiler()
    if compiler is None:
        logger.warning(
            "Running without the CPU kernels, several times slower: "
            "a C compiler (cc, gcc or clang, or CC) is missing."
        )
        return None
    try:
        return ctypes.CDLL(str(_build(compiler)))
    except (OSError, subprocess.SubprocessError, RegistryError) as error:
        detail = error.stderr if isinstance(error, subprocess.CalledProcessError) else error
        logger.warning("Running without the CPU kernels, several times slower: %s", detail)
        return None


def _cpu_fits() -> bool:
    return (
        platform.system() == "Linux"
        and platform.machine() == "x86_64"
        and torch.cpu._is_avx512_bf16_supported()
        and torch.cpu._is_vnni_supported()
    )


def _compiler() -> list[str] | None:
    if asked := os.environ.get("CC"):
        return shlex.split(asked)
    found = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    return None if found is None else [found]


def _build(compiler: list[str]) -> Path:
    """The shared library, from the cache where these sources were compiled for this machine before."""
    version = subprocess.run(
        [*compiler, "--version"], capture_output=True, text=True, check=True, timeout=_SECONDS
    ).stdout
    digest = hashlib.sha256(repr((version, _COMPILE, _cpu_flags())).encode())
    for source in sorted(_SOURCES.iterdir()):
        digest.update(source.read_bytes())
    library = writable_cache("native") / f"kernels-{digest.hexdigest()[:16]}.so"
    if not library.is_file():
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            compiled, linked = Path(scratch) / "kernels.o", Path(scratch) / "kernels.so"
            for command in (
                [*compiler, *_COMPILE, str(_MAIN), "-o", str(compiled)],
                [*compiler, "-shared", "-pthread", str(compiled), "-lm", "-o", str(linked)],
            ):
                subprocess.run(command, capture_output=True, text=True, check=True, timeout=_SECONDS)
            linked.replace(library)  # whole or not at all, whoever else compiles at the same time
    return library


def _cpu_flags() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line for line in lines if line.startswith("flags")), "")
