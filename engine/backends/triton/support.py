"""Whether the Triton kernels run a model, asked without importing triton: most CPU machines lack it."""

from __future__ import annotations

import importlib.util
import logging

import torch

from engine.backends.backend import Backend, Place
from engine.backends.kv_cache import KVCache

logger = logging.getLogger(__name__)

MAX_HEAD_DIM = 256
# The first GPUs, by compute capability, with the conversions of a number format and enough shared memory.
_SINCE = {
    torch.float32: (8, 0),
    torch.bfloat16: (8, 0),
    torch.float16: (8, 0),
    torch.float8_e4m3fn: (8, 9),
}


def make_triton(place: Place) -> Backend | None:
    """None where the kernels do not run, or cannot be compiled for want of a compiler or of Python's
    headers."""
    if not reads_cache(place):
        return None
    # They import triton, which not every machine has.
    from engine.backends.triton.attention import warm_up
    from engine.backends.triton.backend import TritonBackend

    model = place.model
    cache = KVCache(model, 2, place.block_size, place.dtype, place.device, stored=place.stored)
    try:
        warm_up(cache, model.num_heads, place.dtype)
    except Exception:  # Triton raises whatever its compilers do
        logger.warning("Running without our GPU kernels, slower: they cannot be compiled.", exc_info=True)
        return None
    return TritonBackend(place)


def reads_cache(place: Place) -> bool:
    """Whether the kernels read the cache of such a model, on this machine."""
    if place.device.type != "cuda" or place.stored not in _SINCE or place.model.head_dim > MAX_HEAD_DIM:
        return False
    if torch.version.hip is not None or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(place.device) >= _SINCE[place.stored]
