"""What the device does in a pass, on tensors alone: guess, compute, settle. A CUDA graph may hold it all."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import Tensor

from engine.backends.backend import Backend
from engine.backends.kv_cache import KVCache
from engine.model.layers import Attention
from engine.model.running import RunningDecoder
from engine.runner.commit import compact, pack
from engine.runner.drafter import Drafter, Proposal, RootRows, row_size
from engine.runner.hidden_rows import HiddenRows
from engine.runner.sampler import Sampler
from engine.runner.sampling_table import Demand
from engine.runner.step_input import StepInput
from trees.select import Chains
from trees.verify import DraftTrees, deepest_accepted


@dataclass(frozen=True)
class Settled:
    """What a pass has come to, still on the device. It is gone with the next pass."""

    packed: Tensor  # what the host has to know, see `engine.runner.commit.pack`
    logits: Tensor  # [num_nodes_total, vocab], before anything was done to them
    rows: Tensor  # [num_commits, hidden], each request's last committed node's
    stored: bool  # whether these rows are where the next drafts start from already


class Work:
    """drafter: may be another for a while."""

    def __init__(
        self,
        backend: Backend,
        decoder: RunningDecoder,
        cache: KVCache,
        drafter: Drafter,
        max_num_seqs: int,
    ) -> None:
        self.backend, self.decoder, self.cache, self.drafter = backend, decoder, cache, drafter
        self._taps = drafter.taps
        config = decoder.config
        self.hidden = HiddenRows(max_num_seqs, row_size(drafter, config), decoder.embedding)
        self.sampler = Sampler(config.vocab_size, config.eos_token_ids, self.hidden.num_seats, backend)

    def grow(
        self, step: StepInput, chains: Chains, levels: int, samples: bool, attention: Attention | None
    ) -> Proposal:
        """Guess for every request of a pass that decodes."""
        commits, positions = step.commits, step.positions[step.first_rows]
        noise = None
        if levels and samples:
            noise = self.sampler.noise_ahead(commits.seats, positions, levels)
        return self.drafter.grow(
            RootRows(
                hidden=self.hidden.rows[commits.seats],
                roots=commits.roots,
                positions=positions,
                num_nodes=commits.num_nodes,
                max_nodes=commits.max_nodes,
                levels=levels,
                chains=chains,
                noise=noise,
                attention=attention,
            )
        )

    def forward(self, step: StepInput, trees: DraftTrees, attention: Attention) -> Tensor:
        """Run a step whose trees are filled in: the hidden rows, [num_tokens, hidden]."""
        hidden = self.decoder(step.token_ids, step.positions, attention, self._taps)
        if self.drafter.capturable:
            self._observe(step, trees, hidden)
        return hidden

    def observe(self, step: StepInput, trees: DraftTrees, hidden: Tensor) -> None:
        """Let a drafter look at a pass that cannot do so as part of it."""
        if not self.drafter.capturable:
            self._observe(step, trees, hidden)

    def _observe(self, step: StepInput, trees: DraftTrees, hidden: Tensor) -> None:
        before = partial(self.hidden.rows.index_select, 0, step.before_seats)
        self.drafter.observe(step, trees, hidden, before)

    def settle(self, step: StepInput, trees: DraftTrees, hidden: Tensor, demand: Demand) -> Settled:
        """Draw targets, accept and compact. demand: what may be asked of draws."""
        commits = step.commits
        hidden = hidden.index_select(0, commits.rows)
        final = hidden[:, : self.decoder.config.hidden_size] if self._taps else hidden
        logits = self.decoder.logits(final)
        verdict = self.sampler.judge(logits, step, trees, demand)
        last = deepest_accepted(verdict.edges, trees)
        compact(self.backend, self.cache, commits, last, trees)
        rows = hidden[commits.first_nodes + last]
        in_graph = not commits.scheduled
        if in_graph:
            self.hidden.rows[commits.seats] = rows
        return Settled(pack(trees, last, verdict.targets), logits, rows, stored=in_graph)
