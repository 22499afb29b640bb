"""Attention over the paged cache by our own kernel, in bfloat16 on CPUs."""

from __future__ import annotations

import ctypes
from array import array

import torch
from torch import Tensor

from engine.backends.kv_cache import KVCache
from engine.backends.native.library import CPaging, kernels
from engine.backends.rows import PassInput
from engine.backends.threads import num_threads

MAX_HEAD_DIM = 256
_HEAD_DIM_MULTIPLE = 32


def reads_cache(cache: Tensor) -> bool:
    """Whether the kernels read a cache [..., head_dim], on this machine."""
    dim = cache.shape[-1]
    fits = cache.device.type == "cpu" and cache.dtype == torch.bfloat16
    return fits and dim % _HEAD_DIM_MULTIPLE == 0 and dim <= MAX_HEAD_DIM and kernels() is not None


class NativeAttention:
    """The attention callable of one pass (see `engine.model.layers.Attention`), and what the kernels of a
    whole pass need to know of it. Only where `engine.backends.native.decoder.can_take` holds."""

    def __init__(self, step: PassInput, cache: KVCache, num_heads: int) -> None:
        library = kernels()
        assert library is not None
        self._library = library
        self._cache = cache
        self._step = step  # holds the memory that `paging` points to
        # Requests keep their tables in arrays, which are read where they lie.
        self._tables = [t if isinstance(t, array) else array("q", t) for t in step.block_tables]
        self._places = array("q", [table.buffer_info()[0] for table in self._tables])
        self.paging = CPaging(
            num_tokens=len(step.slots),
            num_requests=len(self._tables),
            num_threads=num_threads(),
            num_heads=num_heads,
            num_kv_heads=cache.num_kv_heads,
            head_dim=cache.k.shape[-1],
            block_size=cache.block_size,
            num_slots=cache.k.shape[2],
            k_cache=cache.k.data_ptr(),
            v_cache=cache.v.data_ptr(),
            slots=step.slots.data_ptr(),
            prefix_len=step.prefix_len.ctypes.data,
            ancestors=step.ancestors.data_ptr(),
            starts=step.starts.ctypes.data,
            block_tables=self._places.buffer_info()[0],
        )

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self._cache.write(layer, self._step.slots, k, v)
        out = torch.empty(q.shape[0], q.shape[1] * q.shape[2])
        self._library.gorgon_attend(
            ctypes.byref(self.paging), layer, q.contiguous().data_ptr(), out.data_ptr()
        )
        return out.to(q.dtype)
