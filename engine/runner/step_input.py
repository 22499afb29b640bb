"""What a forward pass is given on the device, and how rows of requests are laid out for it.

The flat row of a pass: for each request its known tokens, then its draft nodes.

    | chunk ... root | node 1 ... node n | chunk ... | root | node 1 ... | ...
      request 0                            request 1   request 2
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.backends.rows import IntArray, PassInput
from engine.batch import RequestState, ScheduledRequest
from engine.runner.transfer import together
from trees.verify import DraftTrees


@dataclass(frozen=True)
class CommitRows:
    """The requests of a pass that commit, and where their trees lie in the flat row."""

    scheduled: list[ScheduledRequest]
    num_nodes: Tensor  # [num_commits] int64, root included
    rows: Tensor  # [num_nodes_total] int64: flat row of each root and draft node, request by request
    places: Tensor  # [num_nodes_total] int64: the same row's place in [num_commits, max_nodes], flat
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


def build_rows(
    requests: Sequence[RequestState],
    firsts: Sequence[int],
    ends: Sequence[int],
    block_size: int,
    device: torch.device,
) -> PassInput:
    """A plain causal pass over the positions firsts[i] to ends[i] - 1 of each request, for drafters with KV
    of their own. Where a position is past the known tokens, its token id is 0 for the caller to fill."""
    rows = lay_out_rows(requests, firsts, ends, block_size)
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
class RowsLayout:
    """A pass over rows while it is still on the host; see PassInput."""

    token_ids: IntArray
    positions: IntArray
    slots: IntArray
    prefix_len: IntArray
    starts: IntArray
    block_tables: Sequence[Sequence[int]]
    context_lens: IntArray

    def arrays(self) -> dict[str, IntArray]:
        """What goes to the device."""
        return {"token_ids": self.token_ids, "positions": self.positions, "slots": self.slots}


def lay_out_rows(
    requests: Sequence[RequestState], firsts: Sequence[int], ends: Sequence[int], block_size: int
) -> RowsLayout:
    """See `build_rows`."""
    lengths = np.array(ends, dtype=np.int64) - np.array(firsts, dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    total = int(starts[-1])
    token_ids, slots = np.zeros(total, dtype=np.int64), np.zeros(total, dtype=np.int64)
    positions = np.arange(total) - np.repeat(starts[:-1] - np.array(firsts, dtype=np.int64), lengths)
    for request, first, end, start, stop in zip(requests, firsts, ends, starts, starts[1:], strict=False):
        known = request.token_ids[first:end]
        token_ids[start : start + len(known)] = known
        slots[start:stop] = _slots_of(request.block_table, positions[start:stop], block_size)
    return RowsLayout(
        token_ids=token_ids,
        positions=positions,
        slots=slots,
        prefix_len=positions + 1,
        starts=starts,
        block_tables=[request.block_table for request in requests],
        context_lens=np.array(ends, dtype=np.int64),
    )


def _slots_of(block_table: Sequence[int], logical: IntArray, block_size: int) -> IntArray:
    first = int(logical[0]) // block_size
    last = int(logical[-1]) // block_size
    blocks = np.array(block_table[first : last + 1], dtype=np.int64)
    slots: IntArray = blocks[logical // block_size - first] * block_size + logical % block_size
    return slots
