"""How a pass is run: laid out, filled with guesses, computed and settled. As it is written here, or by a CUDA
graph that was captured of the same work (`engine.runner.graphs`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from engine.backends.backend import Backend
from engine.backends.kv_cache import KVCache
from engine.batch import Batch
from engine.model.layers import Attention
from engine.runner.drafter import Proposal
from engine.runner.layout import lay_out
from engine.runner.sampling_table import Demand
from engine.runner.step_buffers import StepBuffers
from engine.runner.step_input import StepInput
from trees.select import Chains
from trees.verify import DraftTrees


@dataclass(frozen=True)
class Settled:
    """What a pass has come to, still on the device. It is gone with the next pass."""

    packed: Tensor  # what the host has to know, see `engine.runner.commit.pack`
    logits: Tensor  # [num_nodes_total, vocab], before anything was done to them
    rows: Tensor  # [num_commits, hidden], each request's last committed node's
    stored: bool  # whether these rows are where the next drafts start from already


class Work(Protocol):
    """What the device does in a pass, on tensors alone."""

    def grow(
        self, step: StepInput, chains: Chains, levels: int, samples: bool, attention: Attention | None
    ) -> Proposal:
        """Guess for every request of a pass that decodes."""

    def forward(self, step: StepInput, trees: DraftTrees, attention: Attention) -> Tensor:
        """Fill the step in and run it: the hidden rows, [num_tokens, hidden]."""

    def settle(self, step: StepInput, trees: DraftTrees, hidden: Tensor, demand: Demand) -> Settled:
        """Draw targets, accept and compact. demand: what may be asked of draws."""


class StepPass(ABC):
    """One pass. Its methods are called in this order, the first one perhaps while another pass still runs."""

    @abstractmethod
    def complete(self, batch: Batch, proposal: Proposal | None, before_seats: Sequence[int]) -> StepInput:
        """Lay out the rest of the pass, and guess what `proposal` does not. before_seats: see StepInput."""

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

    def __init__(self, work: Work, cache: KVCache, backend: Backend, num_heads: int) -> None:
        self._work, self._cache, self._backend, self._num_heads = work, cache, backend, num_heads

    def complete(self, batch: Batch, proposal: Proposal | None, before_seats: Sequence[int]) -> StepInput:
        block_size = self._cache.block_size
        layout = lay_out(batch.scheduled, block_size)
        buffers = StepBuffers.of_pass(layout, before_seats, block_size, self._cache.k.device)
        buffers.place()
        if proposal is not None:
            buffers.take(proposal, len(layout.arrays["drafting"]))
        self._trees = buffers.trees(0 if proposal is None else proposal.max_depth)
        step = buffers.step(layout)
        step.fill(self._trees)  # attention is laid out by what each row sees
        return step

    def forward(self, step: StepInput) -> tuple[DraftTrees, Tensor]:
        attention = self._backend.attention(step, self._cache, self._num_heads)
        self._hidden = self._work.forward(step, self._trees, attention)
        return self._trees, self._hidden

    def settle(self, step: StepInput, demand: Demand) -> Settled:
        return self._work.settle(step, self._trees, self._hidden, demand)
