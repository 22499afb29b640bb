"""Attention over the paged cache with plain torch operators on any device.

Requests of similar size are attended together; the grouping and the masks are made once a step and used by
every layer.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.backends.kv_cache import KVCache
from engine.backends.rows import PassInput
from engine.backends.visibility import visibility

# Between these many scores (all heads together), two batched products beat torch's fused kernel in bfloat16
# on CPUs, by about two. Below, calls cost more than they save; above, the scores take too much memory.
_PRODUCTS_FROM, _PRODUCTS_TO = 3 << 13, 3 << 23


@dataclass(frozen=True)
class AttentionGroup:
    """Requests attended in one call, queries padded to the longest (`padded` tells which ones are real)."""

    rows: Tensor  # [num_requests * num_queries] flat rows; a padding query repeats its request's first
    blocks: Tensor  # [num_requests, num_blocks]; shorter tables repeat block 0, which the mask hides
    run: int | None  # first block of a single request whose blocks are consecutive
    bias: Tensor  # [num_requests, 1, heads_per_kv * num_queries, num_keys]: 0 where visible, else -inf
    real: Tensor | None  # [num_real] indices into rows; None where nothing is padded
    covers_pass: bool  # rows are exactly the flat row, in order


class PagedAttention:
    """The attention callable of one pass (see `engine.model.layers.Attention`)."""

    def __init__(self, step: PassInput, cache: KVCache, num_heads: int) -> None:
        self._cache = cache
        self._slots = step.slots
        self._num_kv_heads = cache.num_kv_heads
        self._heads_per_kv = num_heads // cache.num_kv_heads
        self._groups = [
            self._make_group(step, members) for members in _group_requests(step, cache.block_size)
        ]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self._cache.write(layer, self._slots, k, v)
        if len(self._groups) == 1 and self._groups[0].covers_pass:
            return self._attend(layer, q, self._groups[0])
        out = q.new_empty(q.shape[0], q.shape[1] * q.shape[2])
        for group in self._groups:
            read = self._attend(layer, q.index_select(0, group.rows), group)
            if group.real is None:
                out.index_copy_(0, group.rows, read)
            else:
                out.index_copy_(0, group.rows[group.real], read.index_select(0, group.real))
        return out

    def _attend(self, layer: int, q: Tensor, group: AttentionGroup) -> Tensor:
        """q: [num_requests * num_queries, num_heads, head_dim], returned with its heads joined."""
        requests, head_dim = group.blocks.shape[0], q.shape[-1]
        queries = q.shape[0] // requests
        if group.run is None:
            k, v = self._cache.read(layer, group.blocks)
        else:
            k, v = self._cache.read_run(layer, group.run, group.blocks.shape[1])
        # The query heads that share a KV head become further queries of it: K and V are never repeated.
        q = q.view(requests, queries, self._num_kv_heads, self._heads_per_kv, head_dim)
        q = q.permute(0, 2, 3, 1, 4).reshape(requests, self._num_kv_heads, -1, head_dim)
        out = _attention(q, k, v, group.bias)
        out = out.view(requests, self._num_kv_heads, self._heads_per_kv, queries, head_dim)
        return out.permute(0, 3, 1, 2, 4).reshape(requests * queries, -1)

    def _make_group(self, step: PassInput, members: list[int]) -> AttentionGroup:
        lengths = [int(step.starts[i + 1] - step.starts[i]) for i in members]
        queries = max(lengths)
        num_blocks = max(_blocks_used(step, i, self._cache.block_size) for i in members)
        rows = np.repeat(step.starts[members], queries).reshape(-1, queries)
        blocks = np.zeros((len(members), num_blocks), dtype=np.int64)
        for row, (i, length) in enumerate(zip(members, lengths, strict=True)):
            rows[row, :length] += np.arange(length)
            used = step.block_tables[i][:num_blocks]
            blocks[row, : len(used)] = used
        real = np.flatnonzero(np.arange(queries) < np.array(lengths)[:, None])
        device = self._cache.k.device
        flat_rows = torch.from_numpy(rows.reshape(-1)).to(device)
        visible = visibility(
            torch.from_numpy(step.prefix_len[rows]).to(device),
            step.ancestors.index_select(0, flat_rows).view(rows.shape),
            num_blocks * self._cache.block_size,
        )
        bias = torch.zeros(visible.shape, dtype=self._cache.dtype, device=device)
        bias.masked_fill_(~visible, float("-inf"))
        return AttentionGroup(
            rows=flat_rows,
            blocks=torch.from_numpy(blocks).to(device),
            run=int(blocks[0, 0]) if len(blocks) == 1 and bool((np.diff(blocks[0]) == 1).all()) else None,
            bias=bias.repeat(1, self._heads_per_kv, 1).unsqueeze(1),
            real=None if len(real) == rows.size else torch.from_numpy(real).to(device),
            covers_pass=len(real) == rows.size and members == list(range(len(step.starts) - 1)),
        )


def _attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(head_dim) + bias) v, by whichever of torch's ways is faster.

    q: [num_requests, kv_heads, num_rows, head_dim]; k, v: [num_requests, kv_heads, num_keys, head_dim];
    bias: [num_requests, 1, num_rows, num_keys].
    """
    shape = (*q.shape[:3], k.shape[2])
    in_range = _PRODUCTS_FROM <= math.prod(shape) <= _PRODUCTS_TO
    if q.dtype != torch.bfloat16 or q.device.type != "cpu" or not in_range:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    scaled, k, v = (x.contiguous().flatten(0, 1) for x in (q * q.shape[-1] ** -0.5, k, v))
    scores = torch.bmm(scaled, k.transpose(1, 2)).view(shape).add_(bias)
    return torch.bmm(scores.softmax(dim=-1).flatten(0, 1), v).view(q.shape)


def _blocks_used(step: PassInput, request: int, block_size: int) -> int:
    return -(-int(step.context_lens[request]) // block_size)


def _group_requests(step: PassInput, block_size: int) -> list[list[int]]:
    """Requests by queries and context, each within a factor of two, so that padding stays bounded."""
    groups: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    for i in range(len(step.starts) - 1):
        queries = int(step.starts[i + 1] - step.starts[i])
        groups[queries.bit_length(), _blocks_used(step, i, block_size).bit_length()].append(i)
    return list(groups.values())
