"""CUDA graphs of decoding passes: some for each of a few sizes, which smaller passes are padded to.

A pass whose requests each bring their root and a tree, no prompts, has few shapes. It is captured in three
parts: the *drafting* part guesses, once for each number of levels that heads may be asked for, and once more
with the noise of draws; the *forward* part fills the trees in, runs the decoder and lets the drafter look;
the *settling* part draws targets, accepts, compacts and packs what was committed, once for requests that ask
for their likeliest tokens alone and once for whatever may be asked. Everything that differs from step to step
is copied into the same places on the device beforehand, see `engine.runner.bucket`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from torch import Tensor

from engine.backends.attention import FixedAttention
from engine.backends.rows import PassShape
from engine.batch import Batch
from engine.runner.bucket import Bucket, BucketBuffers
from engine.runner.drafter import Proposal
from engine.runner.layout import Layout
from engine.runner.passes import StepPass
from engine.runner.sampling_table import EVERYTHING, Demand
from engine.runner.step_input import StepInput
from engine.runner.work import Settled, Work
from trees.verify import DraftTrees

_MOST_DRAWN = (
    128  # rows that draws are captured for: of more they take much memory, and longer than launching
)
_REHEARSALS = 2  # the second finds kernels compiled and workspaces in place

Run = Callable[[], None]


class Capture(Protocol):
    """Makes work that can be repeated, on the same places, at less cost for the host."""

    def rehearse(self, run: Run) -> None:
        """Run it as it is, so that whatever happens the first time has happened."""

    def record(self, run: Run) -> Run:
        """What does the same again. It need not have run when this returns."""


class DraftGraphs:
    """The graphs that guess for one bucket: one for each number of levels, from none, the chains alone, and
    one of all levels for requests that sample.

    attention: of the roots, where the drafter has one.
    """

    def __init__(
        self, buffers: BucketBuffers, attention: FixedAttention | None, work: Work, num_levels: int
    ) -> None:
        self._buffers, self._attention, self._work = buffers, attention, work
        self.num_levels = num_levels
        self._runs: list[Run] = [partial(self._run, levels, False) for levels in range(num_levels + 1)]
        self._sampled: Run = partial(self._run, num_levels, True)

    def rehearse(self, capture: Capture) -> None:
        """On a pass that has been prepared and completed."""
        capture.rehearse(self._runs[-1])
        if self.num_levels:
            capture.rehearse(self._sampled)

    def record(self, capture: Capture) -> None:
        self._runs = [capture.record(run) for run in self._runs]
        if self.num_levels:
            self._sampled = capture.record(self._sampled)

    def prepare(self, shape: PassShape) -> None:
        if self._attention is not None:
            self._attention.load(shape.roots())

    def guess(self, levels: int, samples: bool) -> None:
        """Guess for a pass that has been prepared and completed."""
        run = self._sampled if samples and levels else self._runs[levels]
        run()

    def _run(self, levels: int, samples: bool) -> None:
        buffers, fixed = self._buffers, self._attention
        buffers.place_roots(None if fixed is None else fixed.prefix_len)
        attention = None if fixed is None else fixed.attention
        proposal = self._work.grow(buffers.step(), buffers.chains(), levels, samples, attention)
        buffers.take(proposal, self._buffers.bucket.num_requests)


class StepGraph(StepPass):
    """The graphs of one bucket; until they are recorded, their work is done as it is written."""

    _layout: Layout  # of the pass that was prepared
    _levels: int
    _samples: bool
    _trees: DraftTrees
    _hidden: Tensor

    def __init__(
        self,
        buffers: BucketBuffers,
        attention: FixedAttention,
        drafting: DraftGraphs | None,
        work: Work,
    ) -> None:
        super().__init__(work)
        self._buffers = buffers
        self._attention = attention
        self._drafting = drafting
        self._forward: Run = self._run_forward
        self._settle_plain: Run = partial(self._run_settle, Demand.NOTHING)
        self._settle_all: Run | None = None
        if buffers.bucket.num_tokens <= _MOST_DRAWN:
            self._settle_all = partial(self._run_settle, EVERYTHING)
        self._settled: dict[Demand, Settled] = {}

    @property
    def bucket(self) -> Bucket:
        return self._buffers.bucket

    @property
    def num_levels(self) -> int | None:
        """Of guesses that it can make itself; None where it makes none, not even of chains."""
        return None if self._drafting is None else self._drafting.num_levels

    def rehearse(self, capture: Capture, example: Batch) -> None:
        """Get all parts ready to be recorded. example: a pass that the bucket holds."""
        for _ in range(_REHEARSALS):
            self.prepare(example, self.num_levels, Demand.NOTHING)
            self._buffers.complete(self._layout, None, [self._buffers.spare_seat] * len(example.scheduled))
            if self._drafting is not None:
                self._drafting.rehearse(capture)
            for run in (self._forward, self._settle_plain, self._settle_all):
                if run is not None:
                    capture.rehearse(run)

    def record(self, capture: Capture) -> None:
        """From now on run what is captured of all parts."""
        if self._drafting is not None:
            self._drafting.record(capture)
        self._forward = capture.record(self._forward)
        self._settle_plain = capture.record(self._settle_plain)
        if self._settle_all is not None:
            self._settle_all = capture.record(self._settle_all)

    def prepare(self, batch: Batch, levels: int | None, demand: Demand) -> None:
        """Tell the graphs of a pass that the bucket holds, as far as it does not depend on the pass before,
        which need not have ended.

        levels: of guesses that are to be made here, at most `num_levels`; None where a proposal brings them.
        """
        self._levels = -1 if levels is None else levels
        self._samples = Demand.DRAW in demand
        self._layout = self._buffers.prepare(batch)
        if self._drafting is not None and self._levels >= 0:
            self._drafting.prepare(self._layout.shape)
        self._attention.load(self._layout.shape)

    def complete(self, batch: Batch, proposal: Proposal | None, before_seats: Sequence[int]) -> StepInput:
        self._buffers.complete(self._layout, proposal, before_seats)
        if self._drafting is not None and self._levels >= 0:
            self._drafting.guess(self._levels, self._samples)
        return self._buffers.step(self._layout)

    def forward(self, step: StepInput) -> tuple[DraftTrees, Tensor]:
        self._forward()
        num_requests = len(step.scheduled)
        return self._trees.first(num_requests), self._hidden[: len(step.token_ids)]

    def settle(self, step: StepInput, demand: Demand) -> Settled:
        if demand and self._settle_all is None:
            return self._work.settle(step, self._trees.first(len(step.scheduled)), self._hidden, demand)
        run = self._settle_all if demand else self._settle_plain
        if run is not None:
            run()
        settled = self._settled[EVERYTHING if demand else Demand.NOTHING]
        requests, rows = len(step.scheduled), len(step.token_ids)
        return Settled(
            settled.packed[:requests], settled.logits[:rows], settled.rows[:requests], settled.stored
        )

    def _run_forward(self) -> None:
        self._buffers.place(self._attention.prefix_len)
        self._trees = self._buffers.trees(self.bucket.max_nodes - 1)
        step = self._buffers.step()
        step.fill(self._trees)
        self._hidden = self._work.forward(step, self._trees, self._attention.attention)

    def _run_settle(self, demand: Demand) -> None:
        step = self._buffers.step()
        self._settled[demand] = self._work.settle(step, self._trees, self._hidden, demand)


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
