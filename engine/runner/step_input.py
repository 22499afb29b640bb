"""Turns a batch into the arrays of one forward pass. Host side, numpy; one conversion to tensors at the end.

The flat row of a pass: for each request its known tokens, then its draft nodes.

    | chunk ... root | node 1 ... node n | chunk ... | root | node 1 ... | ...
      request 0                            request 1   request 2

How many nodes a tree has is known here, which shape it has is not: the drafter says so on the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.runner.transfer import together
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
    drafting: Tensor  # [num_drafting] int64: which of them have drafts
    node_slots: Tensor  # [num_commits, max_nodes] int64: slots of the logical positions base + node
    state_slots: Tensor  # [num_commits] int64: rows of the runner's per-request state
    max_nodes: int  # of the largest tree, root included, or more


@dataclass(frozen=True)
class StepInput(PassInput):
    """One pass of the base model. Draft rows are unfinished until `fill` has seen the trees."""

    scheduled: list[ScheduledRequest]  # the whole batch, in the order of the flat row
    commits: CommitRows
    first_rows: Tensor  # [num_requests] int64: `starts` on the device, without the end
    before_slots: Tensor  # [num_requests] int64: where the runner keeps the hidden row before each first row
    is_padded: bool = False  # whether there are rows of padding, never the first, whose slots are negative

    def fill(self, trees: DraftTrees) -> None:
        """Put tokens, positions and visibility of the trees into the flat row."""
        rows, places = self.commits.rows, self.commits.places
        self.token_ids[rows] = trees.tokens.reshape(-1)[places]
        self.positions[rows] += trees.depths.reshape(-1)[places]
        self.ancestors[rows] = trees.ancestors.reshape(-1)[places]


@dataclass(frozen=True)
class StepLayout:
    """A pass while it is still on the host. `arrays` are what goes to the device, by their names in StepInput
    and CommitRows; tree rows hold the root's position, and no token yet."""

    scheduled: list[ScheduledRequest]
    arrays: dict[str, IntArray]
    prefix_len: IntArray
    starts: IntArray
    block_tables: list[list[int]]
    context_lens: IntArray
    max_nodes: int

    def step(self, tensors: Mapping[str, Tensor], ancestors: Tensor, *, is_padded: bool = False) -> StepInput:
        """The pass with its arrays on the device. ancestors: [num_tokens] int64, zeros where no tree is."""
        t, offsets = tensors, self.arrays["first_row"].tolist()
        commits = CommitRows(
            scheduled=[s for s in self.scheduled if s.commits],
            num_nodes=t["num_nodes"],
            rows=t["rows"],
            places=t["places"],
            roots=t["roots"],
            offsets=offsets,
            first_row=t["first_row"],
            drafting=t["drafting"],
            node_slots=t["node_slots"],
            state_slots=t["state_slots"],
            max_nodes=self.max_nodes,
        )
        return StepInput(
            token_ids=t["token_ids"],
            positions=t["positions"],
            slots=t["slots"],
            prefix_len=self.prefix_len,
            ancestors=ancestors,
            starts=self.starts,
            block_tables=self.block_tables,
            context_lens=self.context_lens,
            scheduled=self.scheduled,
            commits=commits,
            first_rows=t["first_rows"],
            before_slots=t["before_slots"],
            is_padded=is_padded,
        )


def lay_out_step(
    batch: Batch, block_size: int, before_slots: Sequence[int], max_nodes: int | None = None
) -> StepLayout:
    """The pass that a batch asks for.

    before_slots: see StepInput; max_nodes: columns of the trees, of the largest where None.
    """
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
    committing = [s for s in scheduled if s.commits]
    num_nodes = np.array([s.num_drafts + 1 for s in committing], dtype=np.int64)
    max_nodes = max_nodes or int(num_nodes.max(initial=1))
    return StepLayout(
        scheduled=scheduled,
        arrays={
            **rows.arrays(),
            **_commit_arrays(committing, num_nodes, max_nodes, first_nodes, rows.slots),
            "first_rows": rows.starts[:-1],
            "before_slots": np.array(before_slots, dtype=np.int64),
        },
        prefix_len=rows.prefix_len,
        starts=rows.starts,
        block_tables=rows.block_tables,
        context_lens=rows.context_lens,
        max_nodes=max_nodes,
    )


def build_step(
    batch: Batch, block_size: int, device: torch.device, before_slots: Sequence[int] = ()
) -> StepInput:
    """The same on the device. before_slots: only for drafters that ask for the rows before."""
    layout = lay_out_step(batch, block_size, before_slots)
    tensors = together(layout.arrays, device)
    return layout.step(tensors, torch.zeros_like(tensors["slots"]))


def build_rows(
    requests: Sequence[Request],
    firsts: Sequence[int],
    ends: Sequence[int],
    block_size: int,
    device: torch.device,
) -> PassInput:
    """A plain causal pass over the positions firsts[i] to ends[i] - 1 of each request, for drafters with KV
    of their own. Where a position is past the known tokens, its token id is 0 for the caller to fill."""
    rows = _lay_out(requests, firsts, ends, block_size)
    tensors = together(rows.arrays(), device)
    return PassInput(
        **tensors,
        prefix_len=rows.prefix_len,
        ancestors=torch.zeros_like(tensors["slots"]),
        starts=rows.starts,
        block_tables=rows.block_tables,
        context_lens=rows.context_lens,
    )


@dataclass(frozen=True)
class _Rows:
    token_ids: IntArray
    positions: IntArray
    slots: IntArray
    prefix_len: IntArray
    starts: IntArray
    block_tables: list[list[int]]
    context_lens: IntArray

    def arrays(self) -> dict[str, IntArray]:
        """What goes to the device."""
        return {"token_ids": self.token_ids, "positions": self.positions, "slots": self.slots}


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


def _commit_arrays(
    committing: list[ScheduledRequest],
    num_nodes: IntArray,
    max_nodes: int,
    first_nodes: list[int],
    slots: IntArray,
) -> dict[str, IntArray]:
    first = np.concatenate([[0], np.cumsum(num_nodes)]).astype(np.int64)
    request = np.repeat(np.arange(len(committing)), num_nodes)
    node = np.arange(int(first[-1])) - first[:-1][request]
    rows = np.array(first_nodes, dtype=np.int64)[request] + node
    # Past a tree's nodes lies its root's slot, which nothing is ever moved into.
    node_slots = np.repeat(slots[rows[first[:-1]]], max_nodes).reshape(len(committing), max_nodes)
    node_slots[request, node] = slots[rows]
    return {
        "num_nodes": num_nodes,
        "rows": rows,
        "places": request * max_nodes + node,
        "roots": np.array([s.request.token_ids[-1] for s in committing], dtype=np.int64),
        "first_row": first[:-1],
        "drafting": np.flatnonzero(num_nodes > 1),
        "node_slots": node_slots,
        "state_slots": np.array([s.request.slot for s in committing], dtype=np.int64),
    }


def _slots_of(block_table: list[int], logical: IntArray, block_size: int) -> IntArray:
    first = int(logical[0]) // block_size
    last = int(logical[-1]) // block_size
    blocks = np.array(block_table[first : last + 1], dtype=np.int64)
    slots: IntArray = blocks[logical // block_size - first] * block_size + logical % block_size
    return slots
