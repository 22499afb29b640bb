"""CUDA graphs of decoding passes: one for each of a few sizes, which smaller passes are padded to.

A pass whose requests each bring their root and a tree, no prompts, has few shapes. It is captured in two
parts: the *forward* part fills the trees in, runs the decoder and lets the drafter look; the *settling* part
draws greedy targets, accepts, compacts and packs what was committed. Where a request samples or is penalised,
the second part runs as it does without graphs. Everything that differs from step to step is copied into the
same places on the device beforehand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from engine.model.decoder import Attention
from engine.runner.drafter import Proposal
from engine.runner.step_input import IntArray, PassInput, StepInput
from engine.runner.step_layout import StepLayout, lay_out_step
from engine.scheduling.batch import Batch
from trees.verify import DraftTrees

_REHEARSALS = 2  # the second finds kernels compiled and workspaces in place

Run = Callable[[], None]


class Capture(Protocol):
    """Makes work that can be repeated, on the same places, at less cost for the host."""

    def rehearse(self, run: Run) -> None:
        """Run it as it is, so that whatever happens the first time has happened."""

    def record(self, run: Run) -> Run:
        """What does the same again. It need not have run when this returns."""


@dataclass(frozen=True, order=True)
class Bucket:
    """The largest pass that a graph serves: the tokens in it, its requests, the nodes of one tree."""

    num_tokens: int
    num_requests: int
    max_nodes: int

    @classmethod
    def of(cls, num_requests: int, num_tokens: int, max_nodes: int) -> Bucket:
        """max_nodes: of any tree. Where each request has its root, one tree has what tokens are left."""
        num_tokens = min(num_tokens, num_requests * max_nodes)
        return cls(num_tokens, num_requests, min(max_nodes, num_tokens - num_requests + 1))

    def holds(self, batch: Batch) -> bool:
        """Whether a batch fits, by size."""
        widest = max((s.num_drafts + 1 for s in batch.scheduled), default=0)
        return (
            batch.num_tokens <= self.num_tokens
            and len(batch.scheduled) <= self.num_requests
            and widest <= self.max_nodes
        )


@dataclass(frozen=True)
class FixedAttention:
    """Attention that is made once for a bucket. `load` tells it of a pass, without rows of padding; what
    `attention` computes with lies in the same places ever after."""

    attention: Attention
    load: Callable[[PassInput], None]


class Work(Protocol):
    """What the graphs hold, on tensors alone."""

    def forward(self, step: StepInput, trees: DraftTrees, attention: Attention) -> Tensor:
        """Fill the step in and run it: the hidden rows, [num_tokens, hidden]."""

    def settle(self, step: StepInput, trees: DraftTrees, hidden: Tensor) -> Tensor:
        """Commit what greedy requests gain; as `engine.runner.commit.pack` returns it."""


MakeAttention = Callable[[Bucket, Tensor, Tensor], FixedAttention]  # from slots and ancestors, [num_tokens]


class StepBuffers:
    """The places on the device of all that a pass of one bucket is told.

    spare_slot: a row of the runner's per-request state that belongs to nobody, for requests of padding.
    """

    def __init__(self, bucket: Bucket, spare_slot: int, device: torch.device) -> None:
        self.bucket = bucket
        self.spare_slot = spare_slot
        self._device = device
        tokens, requests, nodes = bucket.num_tokens, bucket.num_requests, bucket.max_nodes
        per_token = ("token_ids", "positions", "slots", "rows", "places")
        per_request = (
            *("num_nodes", "roots", "first_row", "drafting", "state_slots", "first_rows", "before_slots"),
        )
        self._shapes: dict[str, tuple[int, ...]] = {
            **dict.fromkeys(per_token, (tokens,)),
            **dict.fromkeys(per_request, (requests,)),
            "node_slots": (requests, nodes),
        }
        sizes = [int(np.prod(shape)) for shape in self._shapes.values()]
        self._buffer = torch.zeros(sum(sizes), dtype=torch.int64, device=device)
        parts = torch.split(self._buffer, sizes)
        self._tensors = {
            name: part.view(shape) for (name, shape), part in zip(self._shapes.items(), parts, strict=True)
        }
        self.ancestors = self._buffer.new_zeros(tokens)
        # Guesses and their parents; those of earlier steps that remain past a tree's nodes are valid, too.
        self._guesses = self._buffer.new_zeros(requests, nodes - 1)
        self._parents = self._buffer.new_zeros(requests, nodes - 1)
        nothing = np.zeros(0, dtype=np.int64)
        empty = StepLayout([], {"first_row": nothing}, nothing, nothing, [], nothing, nodes)
        self.step = empty.step(self._tensors, self.ancestors, is_padded=True)  # the whole bucket

    @property
    def slots(self) -> Tensor:
        return self._tensors["slots"]

    def trees(self) -> DraftTrees:
        """Of the whole bucket, from what was loaded."""
        tokens = torch.cat((self._tensors["roots"].unsqueeze(1), self._guesses), dim=1)
        parents = torch.nn.functional.pad(self._parents, (1, 0))
        return DraftTrees.build(tokens, parents, self._tensors["num_nodes"], self.bucket.max_nodes - 1)

    def load(
        self, batch: Batch, proposal: Proposal | None, block_size: int, before_slots: Sequence[int]
    ) -> StepInput:
        """Copy a pass into the places, and return it without its padding."""
        layout = lay_out_step(batch, block_size, before_slots, self.bucket.max_nodes)
        packed = torch.empty(len(self._buffer), dtype=torch.int64, pin_memory=self._device.type == "cuda")
        self._pad(layout, packed.numpy())
        self._buffer.copy_(packed, non_blocking=True)
        real = {name: self._tensors[name][: len(values)] for name, values in layout.arrays.items()}
        if proposal is not None:
            columns = slice(1, min(self.bucket.max_nodes, proposal.tokens.shape[1]))
            width = columns.stop - 1
            self._guesses[real["drafting"], :width] = proposal.tokens[:, columns]
            self._parents[real["drafting"], :width] = proposal.parents[:, columns]
        return layout.step(real, self.ancestors[: batch.num_tokens])

    def _pad(self, layout: StepLayout, packed: IntArray) -> None:
        """Write all arrays, longer by what belongs to nobody."""
        arrays, bucket = layout.arrays, self.bucket
        num_requests = len(layout.scheduled)
        fill = {name: 0 for name in arrays}
        fill["slots"] = -1
        fill["num_nodes"] = 1
        fill["state_slots"] = self.spare_slot
        # The first request again: whatever is written for it is written twice, the same.
        fill["before_slots"] = arrays["before_slots"][0]
        fill["node_slots"] = arrays["node_slots"][0, 0]
        # A node that no tree has: what is read there is valid, what is written there nobody reads.
        fill["places"] = num_requests * bucket.max_nodes
        if num_requests == bucket.num_requests:
            narrow = int(np.argmin(arrays["num_nodes"]))
            fill["places"] = narrow * bucket.max_nodes + int(arrays["num_nodes"][narrow])
        start = 0
        for name, shape in self._shapes.items():
            values, stop = arrays[name].reshape(-1), start + int(np.prod(shape))
            packed[start : start + len(values)] = values
            packed[start + len(values) : stop] = fill[name]
            if name == "rows":
                packed[start:stop] = np.arange(shape[0])
            start = stop


class StepGraph:
    """The graphs of one bucket; until they are recorded, their work is done as it is written."""

    _trees: DraftTrees
    _hidden: Tensor
    _packed: Tensor

    def __init__(self, buffers: StepBuffers, attention: FixedAttention, work: Work, block_size: int) -> None:
        self._buffers = buffers
        self._attention = attention
        self._work = work
        self._block_size = block_size
        self._forward: Run = self._run_forward
        self._settle: Run = self._run_settle

    @property
    def bucket(self) -> Bucket:
        return self._buffers.bucket

    def record(self, capture: Capture, example: Batch) -> None:
        """From now on run what is captured of both parts. example: a pass that the bucket holds."""
        for _ in range(_REHEARSALS):
            self.load(example, None, [self._buffers.spare_slot] * len(example.scheduled))
            capture.rehearse(self._run_forward)
            capture.rehearse(self._run_settle)
        self._forward = capture.record(self._run_forward)
        self._settle = capture.record(self._run_settle)

    def load(self, batch: Batch, proposal: Proposal | None, before_slots: Sequence[int]) -> StepInput:
        """Tell the graphs of a pass that the bucket holds; returns it without padding."""
        step = self._buffers.load(batch, proposal, self._block_size, before_slots)
        self._attention.load(step)
        return step

    def forward(self, step: StepInput) -> tuple[DraftTrees, Tensor]:
        """Run what was loaded: its trees, and its hidden rows [num_tokens, hidden]. Both are gone with the
        next step."""
        self._forward()
        num_requests = len(step.scheduled)
        return self._trees.first(num_requests), self._hidden[: len(step.token_ids)]

    def settle(self, step: StepInput) -> Tensor:
        """Commit what was run, whose requests are all greedy; as `Work.settle`."""
        self._settle()
        return self._packed[: len(step.scheduled)]

    def _run_forward(self) -> None:
        step = self._buffers.step
        self._trees = self._buffers.trees()
        self._hidden = self._work.forward(step, self._trees, self._attention.attention)

    def _run_settle(self) -> None:
        self._packed = self._work.settle(self._buffers.step, self._trees, self._hidden)


class StepGraphs:
    """The graphs there are, smallest first."""

    def __init__(self, graphs: Sequence[StepGraph] = ()) -> None:
        self._graphs = sorted(graphs, key=lambda graph: graph.bucket)

    def __len__(self) -> int:
        return len(self._graphs)

    def find(self, batch: Batch) -> StepGraph | None:
        """The smallest that serves a batch; None where it brings prompts or is too large for all."""
        decodes = bool(batch.scheduled) and all(s.num_tokens == 1 and s.commits for s in batch.scheduled)
        if not decodes:
            return None
        return next((graph for graph in self._graphs if graph.bucket.holds(batch)), None)
