"""FlexAttention of torch over the paged cache: through copies of each request's blocks, and through none.

Dong et al. 2024, https://arxiv.org/abs/2412.05496.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from bench.attention_passes import Problem
from trees.family import MAX_DRAFT_NODES

_Q_BLOCK = 128  # rows of a block mask
_SHORT = 128  # queries below which its kernels split the context, for groups that are a power of two
_MOST_ROWS = 64  # of a program that does: it would take all rows of a tree, more than a mask's block

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # request, head, query, key


def _rule(prefix_len: Tensor, ancestors: Tensor) -> MaskMod:
    """The visibility rule for one logical position. Both are [num_requests, num_queries] int64."""

    def sees(request: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        beyond = key - prefix_len[request, query]
        in_tree = (ancestors[request, query] >> beyond.clamp(0, MAX_DRAFT_NODES)) & 1
        return (beyond < 0) | ((beyond <= MAX_DRAFT_NODES) & (in_tree == 1))

    return sees


def _owners(sees: MaskMod, places: Tensor, block_size: int) -> MaskMod:
    """The same for a slot. places: [num_requests, num_blocks] int64, which of its blocks each block is."""

    def owns_and_sees(request: Tensor, head: Tensor, query: Tensor, slot: Tensor) -> Tensor:
        position = places[request, slot // block_size] * block_size + slot % block_size
        return sees(request, head, query, position)

    return owns_and_sees


class FlexAttention:
    """torch's flex_attention, compiled anew for each pass where there is a GPU. Requests are one batch, their
    rows padded to the most."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        step, lengths = problem.step, problem.lengths
        self.num_queries = max(lengths)
        padded = np.repeat(step.starts[:-1], self.num_queries).reshape(-1, self.num_queries)
        real = np.arange(self.num_queries) < np.array(lengths)[:, None]
        padded += np.where(real, np.arange(self.num_queries), 0)
        self._rows = self._to_device(padded.reshape(-1))
        self._real = None if real.all() else self._to_device(np.flatnonzero(real))
        there = self._to_device(real)
        # Rows of padding see nothing.
        prefix_len = self._to_device(step.prefix_len[padded]).where(there, 0)
        self.sees = _rule(prefix_len, step.ancestors[self._rows].view(padded.shape).where(there, 0))
        self.mask = self.make_mask()
        self._flex: Callable[..., Any] = flex_attention
        if problem.device.type == "cuda":
            self._flex = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.problem.store(layer, q, k, v)
        keys, values = self.read(layer)
        if self._real is not None:
            q = q.index_select(0, self._rows)
        q = q.view(-1, self.num_queries, *q.shape[1:]).transpose(1, 2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that it is slow where it is not compiled
            out: Tensor = self._flex(
                q,
                keys,
                values,
                block_mask=self.mask,
                enable_gqa=self.problem.group > 1,
                kernel_options=self.options(),
            )
        out = out.transpose(1, 2).flatten(2).flatten(0, 1)
        return out if self._real is None else out.index_select(0, self._real)

    def make_mask(self) -> BlockMask:
        blocks = np.zeros((len(self.problem.lengths), max(self.problem.num_blocks)), dtype=np.int64)
        for row, table, count in zip(
            blocks, self.problem.step.block_tables, self.problem.num_blocks, strict=True
        ):
            row[:count] = table[:count]
        self._blocks = self._to_device(blocks)
        num_keys = blocks.shape[1] * self.problem.cache.block_size
        return create_block_mask(
            self.sees, len(blocks), None, self.num_queries, num_keys, self.problem.device, _Q_BLOCK
        )

    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values, [num_requests or 1, num_kv_heads, num_keys, head_dim] each."""
        return self.problem.cache.read(layer, self._blocks)

    def options(self) -> dict[str, int]:
        """What its kernels would choose otherwise than they can run here."""
        group = self.problem.group
        if self.num_queries >= _SHORT or group & (group - 1):
            return {}
        rows = 1 << (self.num_queries * group - 1).bit_length()
        return {"BLOCK_M": max(16, group, min(rows, _MOST_ROWS))}

    def _to_device(self, values: np.ndarray[Any, Any]) -> Tensor:
        return torch.from_numpy(values).to(self.problem.device)


class PagedFlexAttention(FlexAttention):
    """The same without copies: all slots of the cache are keys, and the mask knows whose they are. A program
    reads no more keys at once than lie in a block."""

    def make_mask(self) -> BlockMask:
        problem, size = self.problem, self.problem.cache.block_size
        num_requests, total = len(problem.lengths), problem.cache.num_blocks
        q_blocks = -(-self.num_queries // _Q_BLOCK)
        # Positions of blocks that are another's are past any query's tree.
        places = np.full((num_requests, total), 2**30 // size, dtype=np.int64)
        indices = np.zeros((num_requests, 1, q_blocks, total), dtype=np.int32)
        counts = np.zeros((num_requests, 1, q_blocks), dtype=np.int32)
        for request, (count, length) in enumerate(zip(problem.num_blocks, problem.lengths, strict=True)):
            table = problem.step.block_tables[request][:count]
            places[request, table] = np.arange(count)
            indices[request, ..., :count] = table
            counts[request, 0, : -(-length // _Q_BLOCK)] = count  # none for padding
        return BlockMask.from_kv_blocks(
            self._to_device(counts),
            self._to_device(indices),
            BLOCK_SIZE=(_Q_BLOCK, size),
            mask_mod=_owners(self.sees, self._to_device(places), size),
            seq_lengths=(self.num_queries, total * size),
            compute_q_blocks=False,
        )

    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.problem.cache.k[layer].unsqueeze(0), self.problem.cache.v[layer].unsqueeze(0)

    def options(self) -> dict[str, int]:
        return {**super().options(), "BLOCK_N": min(64, self.problem.cache.block_size)}
