"""Lays a pass out, for prompts and trees alike, planned ahead or not. Host side, numpy.

The flat row of a pass: for each request its known tokens, then its draft nodes.

    | chunk ... root | node 1 ... node n | chunk ... | root | node 1 ... | ...
      request 0                            request 1   request 2

Who takes part, and how large each tree is, is known before the pass before has ended; where each request
stands is not. So all that is laid out here counts from a request's first position in the pass. `slots_of` and
whoever calls it add the first positions on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.backends.rows import IntArray, PassInput, PassShape
from engine.batch import RequestState, ScheduledRequest
from engine.runner.transfer import together


@dataclass(frozen=True)
class Layout:
    """arrays: what goes to the device, by name.

    owners            [num_tokens] the request of each row
    offsets           [num_tokens] where the row's K and V are written, from the request's first position
    position_offsets  [num_tokens] its position as the model counts them; of all of a tree the root's
    prefix_offsets    [num_tokens] how many committed positions it sees
    block_starts      [num_requests] where logical block 0 of the request would lie in `blocks`, flat
    blocks            [num_requests, any] those that the pass may write to
    first_rows        [num_requests] the first row of each request
    rows              [num_nodes_total] flat row of each root and draft node, request by request
    places            [num_nodes_total] the same row's place in [num_commits, max_nodes], flat
    num_nodes         [num_commits] nodes of each tree, root included
    first_nodes       [num_commits] index of each root in `rows`
    drafting          [num_drafting] which of those that commit have drafts
    seats             [num_commits]
    """

    scheduled: list[ScheduledRequest]
    committing: list[ScheduledRequest]
    arrays: dict[str, IntArray]
    shape: PassShape
    max_nodes: int

    def token_ids(self) -> IntArray:
        """[num_tokens], the known tokens; 0 where drafts go."""
        found = np.zeros(len(self.arrays["owners"]), dtype=np.int64)
        if len(self.committing) == len(self.scheduled) and len(self.arrays["rows"]) == len(found):
            return found  # a root comes with its tree
        for start, s in zip(self.shape.starts.tolist(), self.scheduled, strict=False):
            first = s.num_computed
            found[start : start + s.num_tokens] = s.request.token_ids[first : first + s.num_tokens]
        return found

    def latest(self, before_seats: Sequence[int]) -> dict[str, IntArray]:
        """What is known last, by name, to be sent with the other arrays: `firsts`, the position of each
        request's first row; `roots`, the token ids of those that commit; `before_seats`, see StepInput."""
        return {
            "firsts": np.array([s.num_computed for s in self.scheduled], dtype=np.int64),
            "roots": np.array([s.request.token_ids[-1] for s in self.committing], dtype=np.int64),
            "before_seats": np.array(before_seats, dtype=np.int64),
        }


def lay_out(
    scheduled: list[ScheduledRequest],
    block_size: int,
    max_nodes: int | None = None,
    num_blocks: int | None = None,
) -> Layout:
    """max_nodes: of the trees' places; num_blocks: of each request that the pass may write to. Where they are
    None, just as many as the pass takes."""
    facts = [(s.num_tokens, s.num_drafts, s.num_computed, s.most_gained, s.commits) for s in scheduled]
    known, drafts, firsts, gained, commits = np.array(facts, dtype=np.int64).reshape(-1, 5).T
    tables = [s.request.block_table for s in scheduled]
    lengths = known + drafts
    arrays, starts = _lay_out_rows(tables, firsts, lengths, block_size, num_blocks)
    owners, offsets = arrays["owners"], arrays["offsets"]
    # A tree's nodes stand where its root does. The root sees what is before it, and itself by its own bit.
    roots = known - commits
    bound = roots[owners]
    arrays["position_offsets"] = np.minimum(offsets, bound)
    arrays["prefix_offsets"] = np.minimum(offsets + 1, bound)
    indices = commits.nonzero()[0]
    committing = [scheduled[i] for i in indices.tolist()]
    num_nodes = drafts[indices] + 1
    max_nodes = int(num_nodes.max(initial=1)) if max_nodes is None else max_nodes
    first_nodes = num_nodes.cumsum() - num_nodes
    tree = np.arange(len(indices)).repeat(num_nodes)
    nodes = np.arange(len(tree)) - first_nodes[tree]
    arrays["rows"] = (starts[:-1] + roots)[indices][tree] + nodes
    arrays["places"] = tree * max_nodes + nodes
    arrays["num_nodes"], arrays["first_nodes"] = num_nodes, first_nodes
    arrays["drafting"] = (num_nodes > 1).nonzero()[0]
    arrays["seats"] = np.array([s.request.seat for s in committing], dtype=np.int64)
    latest = firsts + gained
    shape = PassShape(
        prefix_len=latest[owners] + arrays["prefix_offsets"],
        starts=starts,
        block_tables=tables,
        context_lens=latest + lengths,
    )
    return Layout(scheduled, committing, arrays, shape, max_nodes)


def _lay_out_rows(
    tables: Sequence[Sequence[int]],
    firsts: IntArray,
    lengths: IntArray,
    block_size: int,
    num_blocks: int | None = None,
) -> tuple[dict[str, IntArray], IntArray]:
    """Rows of some requests, so many of each from its first position on; and where each request begins."""
    starts, requests = np.zeros(len(lengths) + 1, dtype=np.int64), np.arange(len(lengths))
    lengths.cumsum(out=starts[1:])
    owners = requests.repeat(lengths)
    first_blocks = firsts // block_size
    if num_blocks is None:
        num_blocks = int(((firsts + lengths - 1) // block_size - first_blocks).max(initial=0)) + 1
    blocks = np.zeros((len(lengths), num_blocks), dtype=np.int64)
    for row, table, first in zip(blocks, tables, first_blocks.tolist(), strict=True):
        used = table[first : first + num_blocks]
        row[: len(used)] = used
    arrays = {
        "owners": owners,
        "offsets": np.arange(len(owners)) - starts[owners],
        "block_starts": requests * num_blocks - first_blocks,
        "blocks": blocks,
        "first_rows": starts[:-1],
    }
    return arrays, starts


def slots_of(
    positions: Tensor, owners: Tensor, block_starts: Tensor, blocks: Tensor, block_size: int
) -> Tensor:
    """The slot mapping, [num_rows] int64. positions, owners: [num_rows] int64, logical positions and whose
    they are; block_starts, blocks: as in Layout."""
    places = block_starts.index_select(0, owners).add_(positions // block_size)
    return blocks.take(places).mul_(block_size).add_(positions % block_size)


def build_rows(
    requests: Sequence[RequestState],
    firsts: Sequence[int],
    ends: Sequence[int],
    block_size: int,
    device: torch.device,
) -> PassInput:
    """A plain causal pass over the positions firsts[i] to ends[i] - 1 of each request, for drafters with KV
    of their own. Where a position is past the known tokens, its token id is 0 for the caller to fill."""
    first, end = np.array(firsts, dtype=np.int64), np.array(ends, dtype=np.int64)
    tables = [request.block_table for request in requests]
    arrays, starts = _lay_out_rows(tables, first, end - first, block_size)
    positions = first[arrays["owners"]] + arrays["offsets"]
    arrays["positions"] = positions
    arrays["token_ids"] = np.zeros_like(positions)
    for request, start, begin, stop in zip(requests, starts.tolist(), firsts, ends, strict=False):
        known = request.token_ids[begin:stop]
        arrays["token_ids"][start : start + len(known)] = known
    t = together(arrays, device)
    return PassInput(
        prefix_len=positions + 1,
        starts=starts,
        block_tables=tables,
        context_lens=end,
        token_ids=t["token_ids"],
        positions=t["positions"],
        slots=slots_of(t["positions"], t["owners"], t["block_starts"], t["blocks"], block_size),
        ancestors=torch.zeros_like(t["positions"]),
    )
