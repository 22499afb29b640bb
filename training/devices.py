"""Where training runs: one device, or several through accelerate. Also the number format and the memory
used."""

from __future__ import annotations

import resource
from datetime import timedelta
from importlib.util import find_spec
from typing import Any

import torch

from engine.config import Device
from engine.errors import GorgonError
from engine.runner.device import resolve_device, resolve_dtype

# The others wait while the first device computes hidden states, which may take hours.
_PATIENCE = timedelta(days=2)


class MissingLibraryError(GorgonError):
    """A library that only training needs is not installed. The message says how to get it."""


def check_installed(*names: str) -> None:
    """Raises MissingLibraryError where one of these libraries is not there."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise MissingLibraryError(
            f"training needs {' and '.join(missing)}: pip install 'gorgon-serve[train]'"
        )


def training_dtype(device: torch.device) -> torch.dtype:
    """The number format of products: bfloat16 where the hardware has it, else float32; float16 would need a
    scaled loss."""
    dtype = resolve_dtype("auto", device)
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def make_accelerator(
    mixed_precision: str = "no", *, device: Device = "auto", heads_first: bool = False
) -> Any:
    """accelerate's Accelerator for this process, one of several under `accelerate launch`.

    mixed_precision: "no", "bf16" or auto, bfloat16 where the hardware computes in it. heads_first: whether
    in some steps a part of what is prepared gets no gradient. Raises ConfigError for a device that is not
    there.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

    place = resolve_device(device)
    if mixed_precision == "auto":
        mixed_precision = "bf16" if training_dtype(place) == torch.bfloat16 else "no"
    handlers = [
        DistributedDataParallelKwargs(find_unused_parameters=heads_first),
        InitProcessGroupKwargs(timeout=_PATIENCE),
    ]
    return Accelerator(mixed_precision=mixed_precision, cpu=place.type == "cpu", kwargs_handlers=handlers)


def peak_resident_mb() -> int:
    """The most of the host's memory that this process has used, in MiB, files mapped from disk included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def peak_cuda_mb() -> int | None:
    """The most memory that tensors used of the current CUDA device, in MiB. None where CUDA is not used."""
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return peak >> 20 if peak else None


def peak_memory_words() -> str:
    """Both figures, for people."""
    cuda = peak_cuda_mb()
    return f"peak memory {peak_resident_mb()} MiB" + ("" if cuda is None else f", {cuda} MiB of the GPU")
