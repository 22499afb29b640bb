"""What "auto" means on this machine: device, number format, memory for the cache, threads."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch

from engine.backends.threads import use_threads
from engine.config import Device, Dtype
from engine.errors import ConfigError
from engine.host import available_memory

_CPU_CACHE_LIMIT = 2 << 30  # bytes; enough for tens of long requests, and no more than a laptop can spare
_CPU_CACHE_SHARE = 0.25  # of the memory that is free
# What is said where the error has no type of its own: by torch's allocator for CPUs, by CUDA and Triton
# outside torch's allocator, by cuBLAS and cuDNN, and by numpy and torch of sizes beyond any address.
_OUT_OF_MEMORY = (
    "can't allocate memory",
    "out of memory",
    "_STATUS_ALLOC_FAILED",
    "array is too big",
    "Maximum allowed dimension exceeded",
    "Storage size calculation overflowed",
)


def resolve_device(device: Device) -> torch.device:
    """Raises ConfigError where CUDA is asked for and there is none."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device", "no CUDA device is visible to torch; use --device cpu or auto")
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


def resolve_dtype(dtype: Dtype, device: torch.device) -> torch.dtype:
    """auto: bfloat16 where the hardware computes in it, else float32 on CPU and float16 on CUDA."""
    if dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def default_batched_tokens(device: torch.device) -> int:
    return 512 if device.type == "cpu" else 4096


def free_memory_for_cache() -> int:
    """Bytes of this machine that the KV cache may take when nobody says how many. Call it with the weights
    loaded; for a GPU see `engine.runner.memory`."""
    return min(int(available_memory() * _CPU_CACHE_SHARE), _CPU_CACHE_LIMIT)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether less to do would have gone well: memory of the device or of the host was short."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    words = str(error)
    return isinstance(error, RuntimeError | ValueError) and any(phrase in words for phrase in _OUT_OF_MEMORY)


def share_cpus(threads: int | None) -> int:
    """Let this process compute with so many threads, or as many as the host grants; returns how many."""
    count = use_threads(threads)
    torch.set_num_threads(count)
    return count


@contextmanager
def torch_threads(count: int | None) -> Generator[None, None, None]:
    """Let torch have so many threads inside, or as many as it has. It takes a microsecond."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
