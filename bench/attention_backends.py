"""The ways to attend over the paged cache that `gorgon bench gpu` puts beside each other.

Each stores a pass's keys and values and reads the cache as the engine lays it out, by the visibility rule of
`engine.backends.torch.attention`. What follows from lengths alone is made beforehand, as the engine's plan
is.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.attention_passes import Problem
from bench.flex_attention import FlexAttention, PagedFlexAttention
from bench.gpu_targets import OWN
from engine.backends.torch.attention import PagedAttention, paged_attention, visibility
from engine.model.decoder import Attention

_WORKSPACE_BYTES = 256 << 20  # FlashInfer's, for what it reads in splits


class MissingBackendError(Exception):
    """This machine does not have it."""


def own(problem: Problem) -> Attention:
    """The engine's."""
    return paged_attention(problem.step, problem.cache, problem.num_heads, problem.num_kv_heads)


def gathered_dot_products(problem: Problem) -> Attention:
    """torch's scaled_dot_product_attention with a mask, over copies of each request's blocks: what the engine
    does where it has no kernels. The copies are made in every layer, and counted."""
    return PagedAttention(problem.step, problem.cache, problem.num_heads, problem.num_kv_heads)


def import_flashinfer(device: torch.device) -> Any:
    """Raises MissingBackendError where it is not installed or there is no GPU."""
    if importlib.util.find_spec("flashinfer") is None:
        raise MissingBackendError("not installed")
    if device.type != "cuda":
        raise MissingBackendError("needs a GPU")
    return importlib.import_module("flashinfer")


class FlashInfer:
    """The library of that name (https://arxiv.org/abs/2501.01005): its decoding over pages where each request
    has one row, else its prompts over pages with a mask."""

    def __init__(self, problem: Problem) -> None:
        flashinfer = import_flashinfer(problem.device)
        self._problem = problem
        step, cache = problem.step, problem.cache

        def integers(values: Any) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=problem.device)

        counts = problem.num_blocks
        ends = [int(length) for length in step.context_lens]
        pages = (
            integers([0, *np.cumsum(counts).tolist()]),
            integers(
                [b for table, count in zip(step.block_tables, counts, strict=True) for b in table[:count]]
            ),
            integers([end - (count - 1) * cache.block_size for end, count in zip(ends, counts, strict=True)]),
        )
        heads = (problem.num_heads, problem.num_kv_heads, cache.k.shape[-1], cache.block_size)
        types = {"q_data_type": cache.dtype, "kv_data_type": cache.stored}
        workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=problem.device)
        if max(problem.lengths) == 1:
            self._wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                workspace, kv_layout="HND", use_tensor_cores=True
            )
            self._wrapper.plan(*pages, *heads, **types)
        else:
            prefix_len = torch.from_numpy(step.prefix_len).to(problem.device)
            seen = [
                visibility(prefix_len[start:stop], step.ancestors[start:stop], end).flatten()
                for start, stop, end in zip(step.starts, step.starts[1:], ends, strict=False)
            ]
            self._wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, kv_layout="HND")
            starts = integers(step.starts.tolist())
            self._wrapper.plan(starts, *pages, *heads, custom_mask=torch.cat(seen), **types)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self._problem.store(layer, q, k, v)
        cache = self._problem.cache
        # [num_blocks, num_kv_heads, block_size, head_dim], as it lies: strides are the library's to follow.
        pages = tuple(
            x[layer].view(x.shape[1], -1, cache.block_size, x.shape[3]).transpose(0, 1)
            for x in (cache.k, cache.v)
        )
        out: Tensor = self._wrapper.run(q.contiguous(), pages)
        return out.flatten(1)


BACKENDS: Mapping[str, Callable[[Problem], Attention]] = {
    OWN: own,
    "SDPA, gathered": gathered_dot_products,
    "FlexAttention, gathered": FlexAttention,
    "FlexAttention, paged": PagedFlexAttention,
    "FlashInfer": FlashInfer,
}
