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

from heads.cache import writable_cache
from heads.errors import RegistryError

logger = logging.getLogger(__name__)

_SOURCES = Path(__file__).parent / "kernels"
_MAIN = _SOURCES / "kernels.c"
# No -ffast-math: sums must come in the order in which they are written. OpenMP is not linked: the kernels
# share the threads of torch's own runtime, a second one would fight it for the cores.
_COMPILE = (
    "-O2",
    "-march=native",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fopenmp",
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
    openmp = _openmp_of_torch()
    if compiler is None or openmp is None:
        missing = "a C compiler (cc, gcc or clang, or CC)" if compiler is None else "torch's OpenMP runtime"
        logger.warning("Running without the CPU kernels, several times slower: %s is missing.", missing)
        return None
    try:
        library = _build(compiler)
        ctypes.CDLL(str(openmp), mode=ctypes.RTLD_GLOBAL)
        return ctypes.CDLL(str(library))
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


def _openmp_of_torch() -> Path | None:
    """The OpenMP runtime that torch has loaded into this process."""
    paths = {line.split(maxsplit=5)[5].strip() for line in _mappings() if ".so" in line}
    names = ("libgomp", "libiomp", "libomp")
    return next((Path(p) for p in sorted(paths) if Path(p).name.startswith(names)), None)


def _mappings() -> list[str]:
    return Path("/proc/self/maps").read_text().splitlines()


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
                [*compiler, "-shared", str(compiled), "-lm", "-o", str(linked)],
            ):
                subprocess.run(command, capture_output=True, text=True, check=True, timeout=_SECONDS)
            linked.replace(library)  # whole or not at all, whoever else compiles at the same time
    return library


def _cpu_flags() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line for line in lines if line.startswith("flags")), "")
