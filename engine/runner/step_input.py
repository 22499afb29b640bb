"""Turns a batch into the arrays of one forward pass. Host side, numpy; one conversion to tensors at the end.

The flat row of a pass: for each request its known tokens, then its draft nodes.

    | chunk ... root | node 1 ... node n | chunk ... | root | node 1 ... | ...
      request 0                            request 1   request 2

How many nodes a tree has is known here, which shape it has is not: the drafter says so on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.scheduling.batch import Batch, ScheduledRequest
from engine.scheduling.request import Request
from trees.verify import DraftTrees

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class PassInput:
    """What a decoder and its attention need of one pass over rows of several requests."""

    token_ids: Tensor  # [num_tokens] int64
    positions: Tensor  # [num_tokens] int64, as the model counts them: base + depth in a tree
    slots: Tensor  # [num_tokens] int64, slot mapping
    prefix_len: IntArray  # [num_tokens] committed positions each token sees
    ancestors: Tensor  # [num_tokens] int64 bit set of the tree nodes each token sees
    starts: IntArray  # [num_requests + 1] flat row where each request begins
    block_tables: list[list[int]]  # per request
    context_lens: IntArray  # [num_requests] logical positions in use, this pass included


@dataclass(frozen=True)
class CommitRows:
    """The requests of a pass that commit, and where their trees lie in the flat row."""

    scheduled: list[ScheduledRequest]
    num_nodes: Tensor  # [num_commits] int64, root included
    rows: Tensor  # [num_nodes_total] int64: flat row of each root and draft node, request by request
    places: (
        Tensor  # [num_nodes_total] int64: request * max_nodes + node, its place in [num_commits, max_nodes]
    )
    roots: Tensor  # [num_commits] int64: root token ids
    offsets: list[int]  # [num_commits]: index of each root in `rows`
    first_row: Tensor  # [num_commits] int64: the same on the device
    drafting: list[int]  # which of them have drafts
    node_slots: Tensor  # [num_commits, max_nodes] int64: slots of the logical positions base + node
    state_slots: Tensor  # [num_commits] int64: rows of the runner's per-request state
    max_nodes: int  # of the largest tree, root included


@dataclass(frozen=True)
class StepInput(PassInput):
    """One pass of the base model. Draft rows are unfinished until `fill` has seen the trees."""

    scheduled: list[ScheduledRequest]  # the whole batch, in the order of the flat row
    commits: CommitRows

    def fill(self, trees: DraftTrees) -> None:
        """Put tokens, positions and visibility of the trees into the flat row."""
        rows, places = self.commits.rows, self.commits.places
        self.token_ids[rows] = trees.tokens.reshape(-1)[places]
        self.positions[rows] += trees.depths.reshape(-1)[places]
        self.ancestors[rows] = trees.ancestors.reshape(-1)[places]


def build_step(batch: Batch, block_size: int, device: torch.device) -> StepInput:
    """The pass that a batch asks for. Tree rows hold the root's position, and no token and ancestors yet."""
    scheduled = batch.scheduled
    known = [s.request.num_computed + s.num_tokens for s in scheduled]
    rows = _lay_out(
        [s.request for s in scheduled],
        [s.request.num_computed for s in scheduled],
        [end + s.num_drafts for s, end in zip(scheduled, known, strict=True)],
        block_size,
    )
    first_nodes = []
    for s, end, stop in zip(scheduled, known, rows.starts[1:], strict=True):
        if s.commits:
            # The root is node 0 of its tree: it sees what is before it, and itself by its own bit.
            first = int(stop) - s.num_drafts - 1
            rows.positions[first:stop] = rows.prefix_len[first:stop] = end - 1
            first_nodes.append(first)
    commits = _commit_rows([s for s in scheduled if s.commits], first_nodes, rows.slots, device)
    return StepInput(**_on_device(rows, device), scheduled=scheduled, commits=commits)


def build_rows(
    requests: Sequence[Request],
    firsts: Sequence[int],
    ends: Sequence[int],
    block_size: int,
    device: torch.device,
) -> PassInput:
    """A plain causal pass over the positions firsts[i] to ends[i] - 1 of each request, for drafters with KV
    of their own. Where a position is past the known tokens, its token id is 0 for the caller to fill."""
    return PassInput(**_on_device(_lay_out(requests, firsts, ends, block_size), device))


@dataclass(frozen=True)
class _Rows:
    token_ids: IntArray
    positions: IntArray
    slots: IntArray
    prefix_len: IntArray
    starts: IntArray
    block_tables: list[list[int]]
    context_lens: IntArray


def _lay_out(
    requests: Sequence[Request], firsts: Sequence[int], ends: Sequence[int], block_size: int
) -> _Rows:
    lengths = np.array(ends, dtype=np.int64) - np.array(firsts, dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    total = int(starts[-1])
    token_ids, slots = np.zeros(total, dtype=np.int64), np.zeros(total, dtype=np.int64)
    positions = np.arange(total) - np.repeat(starts[:-1] - np.array(firsts, dtype=np.int64), lengths)
    for request, first, end, start, stop in zip(requests, firsts, ends, starts, starts[1:], strict=False):
        known = request.token_ids[first:end]
        token_ids[start : start + len(known)] = known
        slots[start:stop] = _slots_of(request.block_table, positions[start:stop], block_size)
    return _Rows(
        token_ids=token_ids,
        positions=positions,
        slots=slots,
        prefix_len=positions + 1,
        starts=starts,
        block_tables=[request.block_table for request in requests],
        context_lens=np.array(ends, dtype=np.int64),
    )


def _commit_rows(
    committing: list[ScheduledRequest], first_nodes: list[int], slots: IntArray, device: torch.device
) -> CommitRows:
    num_nodes = np.array([s.num_drafts + 1 for s in committing], dtype=np.int64)
    max_nodes = int(num_nodes.max(initial=1))
    first = np.concatenate([[0], np.cumsum(num_nodes)]).astype(np.int64)
    request = np.repeat(np.arange(len(committing)), num_nodes)
    node = np.arange(int(first[-1])) - first[:-1][request]
    rows = np.array(first_nodes, dtype=np.int64)[request] + node
    node_slots = np.zeros((len(committing), max_nodes), dtype=np.int64)
    node_slots[request, node] = slots[rows]
    return CommitRows(
        scheduled=committing,
        num_nodes=_tensor(num_nodes, device),
        rows=_tensor(rows, device),
        places=_tensor(request * max_nodes + node, device),
        roots=_tensor(np.array([s.request.token_ids[-1] for s in committing], dtype=np.int64), device),
        offsets=first[:-1].tolist(),
        first_row=_tensor(first[:-1], device),
        drafting=np.flatnonzero(num_nodes > 1).tolist(),
        node_slots=_tensor(node_slots, device),
        state_slots=_tensor(np.array([s.request.slot for s in committing], dtype=np.int64), device),
        max_nodes=max_nodes,
    )


def _slots_of(block_table: list[int], logical: IntArray, block_size: int) -> IntArray:
    first = int(logical[0]) // block_size
    last = int(logical[-1]) // block_size
    blocks = np.array(block_table[first : last + 1], dtype=np.int64)
    slots: IntArray = blocks[logical // block_size - first] * block_size + logical % block_size
    return slots


def _on_device(rows: _Rows, device: torch.device) -> dict[str, Any]:
    return {
        "token_ids": _tensor(rows.token_ids, device),
        "positions": _tensor(rows.positions, device),
        "slots": _tensor(rows.slots, device),
        "prefix_len": rows.prefix_len,
        "ancestors": torch.zeros(len(rows.slots), dtype=torch.int64, device=device),
        "starts": rows.starts,
        "block_tables": rows.block_tables,
        "context_lens": rows.context_lens,
    }


def _tensor(values: IntArray, device: torch.device) -> Tensor:
    return torch.from_numpy(values).to(device, non_blocking=True)
