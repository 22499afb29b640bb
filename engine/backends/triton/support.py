"""Whether the Triton kernels can read a cache, asked without importing triton: most CPU machines lack it."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

MAX_HEAD_DIM = 256
# The first GPUs, by compute capability, with the conversions of a number format and enough shared memory.
_SINCE = {
    torch.float32: (8, 0),
    torch.bfloat16: (8, 0),
    torch.float16: (8, 0),
    torch.float8_e4m3fn: (8, 9),
}


def reads_cache(cache: Tensor) -> bool:
    """Whether the kernels read a cache [..., head_dim], on this machine."""
    if cache.device.type != "cuda" or cache.dtype not in _SINCE or cache.shape[-1] > MAX_HEAD_DIM:
        return False
    if torch.version.hip is not None or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(cache.device) >= _SINCE[cache.dtype]
