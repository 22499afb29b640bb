"""Turns a batch into the arrays of one forward pass. Host side, numpy; one conversion to tensors at the end.

The flat row of a pass: for each request its known tokens, then its draft nodes.

    | chunk ... root | node 1 ... node n | chunk ... | root | node 1 ... | ...
      request 0                            request 1   request 2
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.scheduling.batch import Batch, ScheduledRequest
from trees.family import TreeFamily

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class CommitRows:
    """The requests of a pass that commit, and where their trees lie in the flat row."""

    scheduled: list[ScheduledRequest]
    num_nodes: Tensor  # [num_commits] int64, root included
    rows: Tensor  # [num_nodes_total] int64: flat row of each root and draft node, request by request
    request: Tensor  # [num_nodes_total] int64: index into `scheduled`
    node: Tensor  # [num_nodes_total] int64: tree node
    roots: Tensor  # [num_commits] int64: root token ids
    offsets: list[int]  # [num_commits]: index of each root in `rows`
    first_row: Tensor  # [num_commits] int64: the same on the device
    drafting: Tensor | None  # [num_drafting] int64: which of them have drafts; None where all have
    node_slots: Tensor  # [num_commits, max_nodes] int64: slots of the logical positions base + node
    state_slots: Tensor  # [num_commits] int64: rows of the runner's per-request state
    max_nodes: int  # of the largest tree, root included


@dataclass(frozen=True)
class StepInput:
    """One pass. Draft rows of `token_ids` are zero until the drafter fills them."""

    token_ids: Tensor  # [num_tokens] int64
    positions: Tensor  # [num_tokens] int64, as the model counts them: base + depth in a tree
    slots: Tensor  # [num_tokens] int64, slot mapping
    prefix_len: IntArray  # [num_tokens] committed positions each token sees
    ancestors: IntArray  # [num_tokens] bit set of the tree nodes each token sees
    starts: IntArray  # [num_requests + 1] flat row where each request begins
    block_tables: list[list[int]]  # per request
    context_lens: IntArray  # [num_requests] logical positions in use, this pass included
    commits: CommitRows


class StepInputBuilder:
    """Holds what every pass shares: the family's node tables and the block size."""

    def __init__(self, family: TreeFamily, block_size: int, device: torch.device) -> None:
        self._block_size = block_size
        self._device = device
        self._depths = np.array(family.depths, dtype=np.int64)
        # The set's 64th bit is int64's sign bit, hence through uint64.
        self._ancestors = np.array(family.ancestors, dtype=np.uint64).view(np.int64)

    def build(self, batch: Batch) -> StepInput:
        scheduled = batch.scheduled
        lengths = np.array([s.num_tokens + s.num_drafts for s in scheduled], dtype=np.int64)
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        total = int(starts[-1])
        token_ids, positions, logical, prefix_len, ancestors = (
            np.zeros(total, dtype=np.int64) for _ in range(5)
        )
        tables = [s.request.block_table for s in scheduled]
        slots = np.zeros(total, dtype=np.int64)
        for s, start, end in zip(scheduled, starts[:-1], starts[1:], strict=True):
            request, computed, nodes = s.request, s.request.num_computed, s.num_drafts
            drafts = start + s.num_tokens
            known = np.arange(computed, computed + s.num_tokens)
            token_ids[start:drafts] = request.token_ids[computed : computed + s.num_tokens]
            positions[start:drafts] = known
            prefix_len[start:drafts] = known + 1
            logical[start:end] = np.arange(computed, computed + s.num_tokens + nodes)
            if nodes:
                base = len(request.token_ids) - 1
                positions[drafts:end] = base + self._depths[1 : nodes + 1]
                prefix_len[drafts:end] = base
                ancestors[drafts:end] = self._ancestors[1 : nodes + 1]
            slots[start:end] = self._slots_of(request.block_table, logical[start:end])
        return StepInput(
            token_ids=self._tensor(token_ids),
            positions=self._tensor(positions),
            slots=self._tensor(slots),
            prefix_len=prefix_len,
            ancestors=ancestors,
            starts=starts,
            block_tables=tables,
            context_lens=logical[starts[1:] - 1] + 1,
            commits=self._commit_rows(scheduled, starts, slots),
        )

    def _commit_rows(
        self, scheduled: list[ScheduledRequest], starts: IntArray, slots: IntArray
    ) -> CommitRows:
        indices = [i for i, s in enumerate(scheduled) if s.commits]
        committing = [scheduled[i] for i in indices]
        num_nodes = np.array([s.num_drafts + 1 for s in committing], dtype=np.int64)
        max_nodes = int(num_nodes.max(initial=1))
        root_rows = starts[1:][indices] - num_nodes
        first = np.concatenate([[0], np.cumsum(num_nodes)]).astype(np.int64)
        request = np.repeat(np.arange(len(committing)), num_nodes)
        node = np.arange(int(first[-1])) - first[:-1][request]
        rows = root_rows[request] + node
        drafting = np.flatnonzero(num_nodes > 1)
        node_slots = np.zeros((len(committing), max_nodes), dtype=np.int64)
        node_slots[request, node] = slots[rows]
        return CommitRows(
            scheduled=committing,
            num_nodes=self._tensor(num_nodes),
            rows=self._tensor(rows),
            request=self._tensor(request),
            node=self._tensor(node),
            roots=self._tensor(np.array([s.request.token_ids[-1] for s in committing], dtype=np.int64)),
            offsets=first[:-1].tolist(),
            first_row=self._tensor(first[:-1]),
            drafting=None if len(drafting) == len(committing) else self._tensor(drafting),
            node_slots=self._tensor(node_slots),
            state_slots=self._tensor(np.array([s.request.slot for s in committing], dtype=np.int64)),
            max_nodes=max_nodes,
        )

    def _slots_of(self, block_table: list[int], logical: IntArray) -> IntArray:
        first = int(logical[0]) // self._block_size
        last = int(logical[-1]) // self._block_size
        blocks = np.array(block_table[first : last + 1], dtype=np.int64)
        slots: IntArray = (
            blocks[logical // self._block_size - first] * self._block_size + logical % self._block_size
        )
        return slots

    def _tensor(self, values: IntArray) -> Tensor:
        return torch.from_numpy(values).to(self._device, non_blocking=True)
