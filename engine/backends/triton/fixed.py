"""Attention by our Triton kernels for CUDA graphs: plans that are reserved once and filled for every pass."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from engine.backends.attention import FixedAttention, FixedAttentions
from engine.backends.kv_cache import KVCache
from engine.backends.rows import PassSize
from engine.backends.triton.attention import TritonAttention
from engine.backends.triton.plan import AttentionPlan, Capacity, Scratch, programs_at_once
from engine.backends.triton.tiles import PagedHeads, choose_tile


class TritonAttentions(FixedAttentions):
    """All that it makes share one scratch. max_model_len: positions of the longest request."""

    def __init__(self, cache: KVCache, max_model_len: int) -> None:
        self._cache, self._max_model_len = cache, max_model_len
        self._scratch = Scratch(cache.k.device)

    def make(self, size: PassSize, num_heads: int, slots: Tensor, ancestors: Tensor) -> FixedAttention:
        cache = self._cache
        heads = PagedHeads.of(cache, num_heads)
        # The cache may be smaller than its longest request's tables, where tests have it so.
        capacity = self._capacity(size, cache.num_blocks)
        plan = AttentionPlan.reserve(capacity, heads, cache.k.device, scratch=self._scratch)
        return FixedAttention(TritonAttention(plan, cache, slots, ancestors), plan.update, plan.prefix_len)

    def kept_bytes(self, sizes: Iterable[tuple[PassSize, int]]) -> int:
        cache, nowhere = self._cache, torch.device("meta")
        scratch, total = Scratch(nowhere), 0
        for size, num_heads in sizes:
            heads = PagedHeads.of(cache, num_heads)
            programs = programs_at_once(cache.k.device, choose_tile(heads, size.max_nodes))
            total += AttentionPlan.reserve(self._capacity(size), heads, nowhere, programs, scratch).nbytes
        return total + scratch.nbytes

    def _capacity(self, size: PassSize, most_blocks: int | None = None) -> Capacity:
        blocks = -(-(self._max_model_len + size.max_nodes) // self._cache.block_size)
        blocks = blocks if most_blocks is None else min(most_blocks, blocks)
        return Capacity(size.num_requests, size.num_tokens, size.max_nodes, blocks)
