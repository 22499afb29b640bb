"""Attention over the paged cache by our Triton kernels, on CUDA devices."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from engine.backends.kv_cache import KVCache
from engine.backends.rows import PassInput
from engine.backends.triton.cache import compact, store, write
from engine.backends.triton.kernels.attention import attend, merge
from engine.backends.triton.plan import AttentionPlan, Capacity
from engine.backends.triton.tiles import PagedHeads, padded, query_counts
from engine.model.layers import RotatingAttention


class TritonAttention(RotatingAttention):
    """The attention callable of a pass.

    slots, ancestors: [num_tokens] int64, as in `PassInput`; a row of padding has a negative slot, stores
    nothing, reads zeros and is left out of the plan. With a plan that was reserved, and `slots` and
    `ancestors` that stay where they are, a call can be captured: it serves every pass the plan is given.
    """

    def __init__(self, plan: AttentionPlan, cache: KVCache, slots: Tensor, ancestors: Tensor) -> None:
        self._plan = plan
        self._cache = cache
        self._slots = slots
        self._ancestors = ancestors

    @classmethod
    def for_step(cls, step: PassInput, cache: KVCache, num_heads: int) -> TritonAttention:
        """The attention of one pass."""
        heads = PagedHeads.of(cache, num_heads)
        plan = AttentionPlan.for_step(step, heads, cache.k.device)
        return cls(plan, cache, step.slots, step.ancestors)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._store_and_attend(layer, q, k, v, None)

    def rotate_and_attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor
    ) -> Tensor:
        return self._store_and_attend(layer, q, k, v, (cos, sin))

    def _store_and_attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotation: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        k_cache, v_cache = self._cache.k[layer], self._cache.v[layer]
        out = torch.empty(q.shape[0], q.shape[1] * q.shape[2], dtype=q.dtype, device=q.device)
        q = store(k_cache, v_cache, self._slots, q, k, v, out, rotation)
        self._attend(k_cache, v_cache, q, out)
        return out

    def _attend(self, k_cache: Tensor, v_cache: Tensor, q: Tensor, out: Tensor) -> None:
        plan, heads, tile = self._plan, self._plan.heads, self._plan.tile
        shape = {
            "KV_HEADS": heads.num_kv_heads,
            "GROUP": heads.group,
            "HEAD_DIM": heads.head_dim,
            "DIM": padded(heads.head_dim),
            "ROWS": tile.rows,
        }
        attend[(len(plan.items) * heads.num_kv_heads,)](
            q,
            k_cache,
            v_cache,
            out,
            plan.partials,
            plan.shares,
            plan.items,
            plan.tables,
            plan.prefix_len,
            self._ancestors,
            q.stride(0),
            k_cache.stride(0),
            SCALE=math.log2(math.e) * heads.head_dim**-0.5,
            BLOCK_SIZE=heads.block_size,
            KEYS=tile.keys,
            **shape,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            enable_fp_fusion=True,
        )
        if len(plan.merges):
            grid = (len(plan.merges), tile.queries * heads.group, heads.num_kv_heads)
            merge[grid](
                out, plan.partials, plan.shares, plan.merges, **shape, num_warps=4, enable_fp_fusion=True
            )


def warm_up(cache: KVCache, num_heads: int, dtype: torch.dtype) -> None:
    """Compile all that passes and compaction may launch, by launches over nothing: no request waits for it.

    dtype: the queries'. Takes seconds the first time on a machine, later Triton finds the kernels on disk.
    """
    heads, device = PagedHeads.of(cache, num_heads), cache.k.device
    num_kv_heads = cache.num_kv_heads
    slots = torch.full((1,), -1, device=device)
    qkv = torch.zeros(1, num_heads + 2 * num_kv_heads, heads.head_dim, dtype=dtype, device=device)
    q, k, v = qkv[:, :num_heads], qkv[:, num_heads:-num_kv_heads], qkv[:, -num_kv_heads:]
    rotation = torch.zeros(1, 1, heads.head_dim, dtype=dtype, device=device)
    for max_queries in query_counts(heads):
        plan = AttentionPlan.reserve(Capacity(1, 1, max_queries, 1), heads, device)
        attention = TritonAttention(plan, cache, slots, torch.zeros_like(slots))
        attention.rotate_and_attend(0, q, k, v, rotation, rotation)
    attention(0, q, k, v)
    write(cache.k[0], cache.v[0], slots, k, v)
    nothing = torch.zeros(1, 1, dtype=torch.int64, device=device)
    compact(cache.k, cache.v, nothing, nothing)
