"""Whether the Triton kernels can read a cache, asked without importing triton: most CPU machines lack it."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

MAX_HEAD_DIM = 256
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn)


def reads_cache(cache: Tensor) -> bool:
    """Whether the kernels read a cache [..., head_dim], on this machine."""
    fits = cache.dtype in DTYPES and cache.shape[-1] <= MAX_HEAD_DIM
    return fits and cache.device.type == "cuda" and importlib.util.find_spec("triton") is not None
