"""Turns a batch into the arrays of one forward pass. Host side, numpy; one copy to the device at the end.

How many nodes a tree has is known here, which shape it has is not: the drafter says so on the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.backends.rows import IntArray
from engine.batch import Batch, ScheduledRequest
from engine.runner.step_input import CommitRows, StepInput, lay_out_rows
from engine.runner.transfer import together


@dataclass(frozen=True)
class StepLayout:
    """A pass while it is still on the host. `arrays` are what goes to the device, by their names in StepInput
    and CommitRows; tree rows hold the root's position, and no token yet."""

    scheduled: list[ScheduledRequest]
    arrays: dict[str, IntArray]
    prefix_len: IntArray
    starts: IntArray
    block_tables: Sequence[Sequence[int]]
    context_lens: IntArray
    max_nodes: int

    def step(self, tensors: Mapping[str, Tensor], ancestors: Tensor) -> StepInput:
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
        )


def lay_out_step(batch: Batch, block_size: int, before_slots: Sequence[int]) -> StepLayout:
    """The pass that a batch asks for. before_slots: see StepInput."""
    scheduled = batch.scheduled
    known = [s.request.num_computed + s.num_tokens for s in scheduled]
    rows = lay_out_rows(
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
    max_nodes = int(num_nodes.max(initial=1))
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
        "state_slots": np.array([s.request.seat for s in committing], dtype=np.int64),
    }
