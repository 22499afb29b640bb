"""CUDA graphs of decoding passes: some for each of a few sizes, which smaller passes are padded to.

A pass whose requests each bring their root and a tree, no prompts, has few shapes. It is captured in three
parts: the *drafting* part asks the heads, once for each number of levels they may be asked for; the *forward*
part fills the trees in, runs the decoder and lets the drafter look; the *settling* part draws greedy targets,
accepts, compacts and packs what was committed. Where nobody asks the heads, the first part is left out; where
a request samples or is penalised, the third runs as it does without graphs. Everything that differs from step
to step is copied into the same places on the device beforehand, see `engine.runner.step_buffers`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from torch import Tensor

from engine.model.decoder import Attention
from engine.runner.drafter import Proposal
from engine.runner.step_buffers import Bucket, StepBuffers
from engine.runner.step_input import PassShape, StepInput
from engine.scheduling.batch import Batch
from trees.select import Chains
from trees.verify import DraftTrees

_REHEARSALS = 2  # the second finds kernels compiled and workspaces in place

Run = Callable[[], None]


class Capture(Protocol):
    """Makes work that can be repeated, on the same places, at less cost for the host."""

    def rehearse(self, run: Run) -> None:
        """Run it as it is, so that whatever happens the first time has happened."""

    def record(self, run: Run) -> Run:
        """What does the same again. It need not have run when this returns."""


@dataclass(frozen=True)
class FixedAttention:
    """Attention that is made once for a bucket. `load` tells it of a pass, without rows of padding; what
    `attention` computes with lies in the same places ever after. Rows may see less than `load` was told:
    what is in `prefix_len` when it computes."""

    attention: Attention
    load: Callable[[PassShape], None]
    prefix_len: Tensor  # [num_tokens] integers


class Work(Protocol):
    """What the graphs hold, on tensors alone."""

    def grow(
        self, step: StepInput, chains: Chains, levels: int, attention: Attention | None
    ) -> tuple[Tensor, Tensor]:
        """Ask the heads about every request: as `engine.runner.drafter.Drafter.grow`."""

    def forward(self, step: StepInput, trees: DraftTrees, attention: Attention) -> Tensor:
        """Fill the step in and run it: the hidden rows, [num_tokens, hidden]."""

    def settle(self, step: StepInput, trees: DraftTrees, hidden: Tensor) -> Tensor:
        """Commit what greedy requests gain; as `engine.runner.commit.pack` returns it."""


# From a bucket, the number of query heads, and slots and ancestors, both [num_tokens]
MakeAttention = Callable[[Bucket, int, Tensor, Tensor], FixedAttention]


class DraftGraphs:
    """The graphs by which heads guess for one bucket, one for each number of levels.

    attention: of the roots, where the heads need one.
    """

    def __init__(
        self, buffers: StepBuffers, attention: FixedAttention | None, work: Work, num_levels: int
    ) -> None:
        self._buffers, self._attention, self._work = buffers, attention, work
        self._runs: list[Run] = [partial(self._run, levels) for levels in range(1, num_levels + 1)]

    @property
    def num_levels(self) -> int:
        return len(self._runs)

    def rehearse(self, capture: Capture) -> None:
        """On a pass that has been prepared and completed."""
        capture.rehearse(self._runs[-1])

    def record(self, capture: Capture) -> None:
        self._runs = [capture.record(run) for run in self._runs]

    def prepare(self, shape: PassShape) -> None:
        if self._attention is not None:
            self._attention.load(shape.roots())

    def guess(self, levels: int) -> None:
        """Guess for a pass that has been prepared and completed."""
        self._runs[levels - 1]()

    def _run(self, levels: int) -> None:
        buffers, fixed = self._buffers, self._attention
        buffers.place_roots(None if fixed is None else fixed.prefix_len)
        attention = None if fixed is None else fixed.attention
        buffers.guess(*self._work.grow(buffers.step(), buffers.chains(), levels, attention))


class StepGraph:
    """The graphs of one bucket; until they are recorded, their work is done as it is written."""

    _shape: PassShape  # of the pass that was prepared
    _levels: int
    _trees: DraftTrees
    _hidden: Tensor
    _packed: Tensor

    def __init__(
        self,
        buffers: StepBuffers,
        attention: FixedAttention,
        drafting: DraftGraphs | None,
        work: Work,
    ) -> None:
        self._buffers = buffers
        self._attention = attention
        self._drafting = drafting
        self._work = work
        self._forward: Run = self._run_forward
        self._settle: Run = self._run_settle

    @property
    def bucket(self) -> Bucket:
        return self._buffers.bucket

    @property
    def num_levels(self) -> int:
        """Of guesses that it can make itself."""
        return 0 if self._drafting is None else self._drafting.num_levels

    def rehearse(self, capture: Capture, example: Batch) -> None:
        """Get all parts ready to be recorded. example: a pass that the bucket holds."""
        for _ in range(_REHEARSALS):
            self.prepare(example, self.num_levels)
            self._buffers.complete(example, None, [self._buffers.spare_slot] * len(example.scheduled))
            if self._drafting is not None:
                self._drafting.rehearse(capture)
            capture.rehearse(self._run_forward)
            capture.rehearse(self._run_settle)

    def record(self, capture: Capture) -> None:
        """From now on run what is captured of all parts."""
        if self._drafting is not None:
            self._drafting.record(capture)
        self._forward = capture.record(self._run_forward)
        self._settle = capture.record(self._run_settle)

    def prepare(self, batch: Batch, levels: int) -> None:
        """Tell the graphs of a pass that the bucket holds, as far as it does not depend on the pass before,
        which need not have ended.

        levels: of guesses that are to be made here, in the place of a proposal; at most `num_levels`.
        """
        self._levels = levels
        self._shape = self._buffers.prepare(batch)
        if self._drafting is not None and levels:
            self._drafting.prepare(self._shape)
        self._attention.load(self._shape)

    def complete(self, batch: Batch, proposal: Proposal | None, before_slots: Sequence[int]) -> StepInput:
        """Tell them the rest, and guess; returns the pass without padding."""
        self._buffers.complete(batch, proposal, before_slots)
        if self._drafting is not None and self._levels:
            self._drafting.guess(self._levels)
        return self._buffers.step(batch, self._shape)

    def forward(self, step: StepInput) -> tuple[DraftTrees, Tensor]:
        """Run what was completed: its trees, and its hidden rows [num_tokens, hidden]. Both are gone with the
        next step."""
        self._forward()
        num_requests = len(step.scheduled)
        return self._trees.first(num_requests), self._hidden[: len(step.token_ids)]

    def settle(self, step: StepInput) -> Tensor:
        """Commit what was run, whose requests are all greedy; as `Work.settle`."""
        self._settle()
        return self._packed[: len(step.scheduled)]

    def _run_forward(self) -> None:
        self._buffers.place(self._attention.prefix_len)
        self._trees = self._buffers.trees()
        self._hidden = self._work.forward(self._buffers.step(), self._trees, self._attention.attention)

    def _run_settle(self) -> None:
        self._packed = self._work.settle(self._buffers.step(), self._trees, self._hidden)


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
