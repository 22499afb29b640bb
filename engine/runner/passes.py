"""How a pass is run: laid out, filled with guesses, computed and settled. As it is written here, or by a CUDA
graph that was captured of the same work (`engine.runner.graphs`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from engine.batch import Batch
from engine.runner.drafter import Proposal
from engine.runner.layout import lay_out
from engine.runner.sampling_table import Demand
from engine.runner.step_buffers import StepBuffers
from engine.runner.step_input import StepInput
from engine.runner.work import Settled, Work
from trees.verify import DraftTrees


@dataclass(frozen=True)
class Done:
    """A pass that was run, still on the device."""

    step: StepInput
    hidden: Tensor  # [num_tokens, hidden]
    settled: Settled | None  # None where nobody commits


class StepPass(ABC):
    """One pass."""

    def __init__(self, work: Work) -> None:
        self._work = work

    def run(
        self, batch: Batch, proposal: Proposal | None, before_seats: Sequence[int], demand: Demand
    ) -> Done:
        """Run it. proposal: the guesses that it does not make itself; before_seats: see StepInput."""
        step = self.complete(batch, proposal, before_seats)
        trees, hidden = self.forward(step)
        self._work.observe(step, trees, hidden)
        return Done(step, hidden, self.settle(step, demand) if step.commits.scheduled else None)

    @abstractmethod
    def complete(self, batch: Batch, proposal: Proposal | None, before_seats: Sequence[int]) -> StepInput:
        """Lay out what is not laid out yet, and guess what `proposal` does not."""

    @abstractmethod
    def forward(self, step: StepInput) -> tuple[DraftTrees, Tensor]:
        """Run it: its trees, and its hidden rows [num_tokens, hidden]."""

    @abstractmethod
    def settle(self, step: StepInput, demand: Demand) -> Settled:
        """Commit what was run."""


class EagerPass(StepPass):
    """A pass of any shape, operator by operator."""

    _trees: DraftTrees
    _hidden: Tensor

    def complete(self, batch: Batch, proposal: Proposal | None, before_seats: Sequence[int]) -> StepInput:
        cache = self._work.cache
        layout = lay_out(batch.scheduled, cache.block_size)
        buffers = StepBuffers.of_pass(layout, before_seats, cache.block_size, cache.k.device)
        buffers.place()
        if proposal is not None:
            buffers.take(proposal, len(layout.arrays["drafting"]))
        self._trees = buffers.trees(0 if proposal is None else proposal.max_depth)
        step = buffers.step(layout)
        step.fill(self._trees)  # attention is laid out by what each row sees
        return step

    def forward(self, step: StepInput) -> tuple[DraftTrees, Tensor]:
        work = self._work
        attention = work.backend.attention(step, work.cache, work.decoder.config.num_heads)
        self._hidden = work.forward(step, self._trees, attention)
        return self._trees, self._hidden

    def settle(self, step: StepInput, demand: Demand) -> Settled:
        return self._work.settle(step, self._trees, self._hidden, demand)
