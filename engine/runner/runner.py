"""Everything of a step that happens on the device: draft, forward pass, verification, compaction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from engine.backends.backend import Backend
from engine.backends.kv_cache import KVCache
from engine.batch import Batch, PassResult, ScheduledRequest
from engine.model.layers import Attention
from engine.model.running import RunningDecoder
from engine.runner.commit import Commitment, compact, pack, unpack
from engine.runner.device import torch_threads
from engine.runner.drafter import Drafter, NoDrafter, Proposal, RootRows, row_size
from engine.runner.drafting import levels_of, limit_drafts, propose
from engine.runner.graphs import StepGraph, StepGraphs
from engine.runner.passes import EagerPass, Settled, StepPass
from engine.runner.per_request import PerRequest
from engine.runner.sampler import Sampler, token_logprobs
from engine.runner.sampling_table import Demand
from engine.runner.step_input import StepInput
from engine.runner.transfer import integers, to_host
from trees.select import Chains
from trees.verify import DraftTrees, deepest_accepted

Collect = Callable[[], list[PassResult]]


@dataclass
class _Behind:
    """`length`: how many positions a request had computed when its hidden row was kept."""

    length: int = 0


@dataclass(frozen=True)
class _Prepared:
    """A pass that a graph has been told of before it is known where its requests stand. It is another pass
    once its requests are others."""

    scheduled: list[ScheduledRequest]
    graph: StepGraph


class Runner:
    """Executes batches. Between steps it keeps the KV cache and one hidden row per running request, the row
    that request's next draft starts from."""

    def __init__(
        self,
        backend: Backend,
        decoder: RunningDecoder,
        cache: KVCache,
        drafter: Drafter | None,
        max_num_seqs: int,
    ) -> None:
        self.backend = backend
        self.decoder = decoder
        self.cache = cache
        self.drafter = drafter or NoDrafter()
        self._taps = self.drafter.taps  # kept where another drafter takes its place for a while
        config = decoder.config
        self._device = decoder.embedding.device
        # Two more rows: what padding writes, and zeros.
        self.spare_seat, self._zero_seat = max_num_seqs, max_num_seqs + 1
        self._hidden = decoder.embedding.new_zeros(max_num_seqs + 2, row_size(self.drafter, config))
        self._sampler = Sampler(config.vocab_size, config.eos_token_ids, max_num_seqs + 2, backend)
        self._eager = EagerPass(self, cache, backend, config.num_heads)
        self._graphs = StepGraphs()
        self._prepared: _Prepared | None = None
        self._behind: PerRequest[_Behind] = PerRequest(lambda _: _Behind())
        self.drafter.attach(config, cache)

    @property
    def trims(self) -> bool:
        """Whether trees may turn out smaller than they were planned."""
        return self.drafter.trims and self.backend.host_is_device

    def use_graphs(self, graphs: StepGraphs) -> None:
        """Run what passes they hold by them. Their work is this runner's."""
        self._graphs = graphs

    def resize_cache(self, num_blocks: int) -> None:
        """Give the cache another size; what it held is gone, and so are graphs."""
        self._graphs = StepGraphs()
        self.cache.resize(num_blocks)
        self.drafter.attach(self.decoder.config, self.cache)

    @property
    def works_by_itself(self) -> bool:
        """Whether passes go on while the host does something else."""
        return not self.backend.host_is_device and len(self._graphs) > 0

    def execute(self, batch: Batch) -> list[PassResult]:
        """Run one pass; entry i of the result belongs to `batch.scheduled[i]`.

        Lowers `num_drafts` of requests that the drafter has fewer guesses for.
        """
        return self.launch(batch)()

    def launch(self, batch: Batch) -> Collect:
        """The same in two parts: what is returned waits for the result. Until it has been called, no other
        pass may be launched, but one may be prepared."""
        with torch.inference_mode(), torch_threads(self.backend.torch_threads):
            return self._launch(batch)

    def _launch(self, batch: Batch) -> Collect:
        demand = self._sampler.prepare(batch.scheduled)
        way, proposal = self._choose(batch, demand)
        step = way.complete(batch, proposal, self._before_seats(batch))
        trees, hidden = way.forward(step)
        if not self.drafter.capturable:
            self._observe(step, trees, hidden)
        if not step.commits.scheduled:  # prompts' chunks alone
            self._keep_rows(step, None, hidden)
            return lambda: [PassResult([]) for _ in batch.scheduled]
        settled = way.settle(step, demand)
        packed = to_host(settled.packed)

        def collect() -> list[PassResult]:
            with torch.inference_mode(), torch_threads(self.backend.torch_threads):
                results = self._collect(step, settled, unpack(packed()))
                self._keep_rows(step, settled, hidden)
            for scheduled, result in zip(batch.scheduled, results, strict=True):
                if scheduled.commits:
                    known = len(scheduled.request.token_ids)
                    self._behind[scheduled.request].length = known + len(result.token_ids) - 1
            return results

        return collect

    @torch.inference_mode()
    def prepare(self, batch: Batch) -> None:
        """Lay out a pass that will be launched next, unless another is, while the one before it runs. Its
        requests all decode, and gain `most_gained` tokens at most before."""
        self._prepared = None
        if not self.drafter.capturable:
            return
        limit_drafts(self.drafter, batch)
        graph = self._graphs.find(batch)
        if graph is not None and self._tell(graph, batch, self._sampler.prepare(batch.scheduled)):
            self._prepared = _Prepared(batch.scheduled, graph)

    def draft(self, batch: Batch) -> None:
        """Only the guesses of a pass, to measure what they cost."""
        with torch.inference_mode(), torch_threads(self.backend.torch_threads):
            way, proposal = self._choose(batch, self._sampler.prepare(batch.scheduled))
            way.complete(batch, proposal, self._before_seats(batch))

    def _choose(self, batch: Batch, demand: Demand) -> tuple[StepPass, Proposal | None]:
        """The way to run a pass, told of it, and the guesses that it does not make itself; from then on it is
        known how large trees are."""
        prepared, self._prepared = self._prepared, None
        if prepared is not None and prepared.scheduled is batch.scheduled:
            return prepared.graph, None
        limit_drafts(self.drafter, batch)
        graph = self._graphs.find(batch)
        if graph is not None and self._tell(graph, batch, demand):
            return graph, None
        proposal = propose(self.drafter, batch, self._hidden, self.cache, self.backend, self._sampler, demand)
        graph = self._graphs.find(batch)  # trees may have become smaller
        if graph is None:
            return self._eager, proposal
        graph.prepare(batch, None, demand)
        return graph, proposal

    def _tell(self, graph: StepGraph, batch: Batch, demand: Demand) -> bool:
        """Prepare a graph for a pass that it can make all guesses of; whether it can."""
        levels = levels_of(self.drafter, batch)
        drafts = any(s.num_drafts for s in batch.scheduled)
        if drafts and (graph.num_levels is None or levels > graph.num_levels):
            return False
        graph.prepare(batch, levels if drafts else None, demand)
        return True

    # --- what the device does, see `engine.runner.passes.Work`

    def grow(
        self, step: StepInput, chains: Chains, levels: int, samples: bool, attention: Attention | None
    ) -> Proposal:
        commits, positions = step.commits, step.positions[step.first_rows]
        noise = None
        if levels and samples:
            noise = self._sampler.noise_ahead(commits.seats, positions, levels)
        return self.drafter.grow(
            RootRows(
                hidden=self._hidden[commits.seats],
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
        hidden = self.decoder(step.token_ids, step.positions, attention, self._taps)
        if self.drafter.capturable:
            self._observe(step, trees, hidden)
        return hidden

    def settle(self, step: StepInput, trees: DraftTrees, hidden: Tensor, demand: Demand) -> Settled:
        commits = step.commits
        hidden = hidden.index_select(0, commits.rows)
        final = hidden[:, : self.decoder.config.hidden_size] if self._taps else hidden
        logits = self.decoder.logits(final)
        verdict = self._sampler.judge(logits, step, trees, demand)
        last = deepest_accepted(verdict.edges, trees)
        compact(self.backend, self.cache, commits, last, trees)
        rows = hidden[commits.first_nodes + last]
        in_graph = not commits.scheduled
        if in_graph:
            self._hidden[commits.seats] = rows
        return Settled(pack(trees, last, verdict.targets), logits, rows, stored=in_graph)

    def _observe(self, step: StepInput, trees: DraftTrees, hidden: Tensor) -> None:
        self.drafter.observe(step, trees, hidden, partial(self._hidden.index_select, 0, step.before_seats))

    # --- what is kept from pass to pass

    def _before_seats(self, batch: Batch) -> list[int]:
        """Where the hidden row of the token before each request's first in this pass is kept; zeros lie where
        it is not known."""
        seats = []
        for scheduled in batch.scheduled:
            request = scheduled.request
            known = request.num_computed and self._behind[request].length == request.num_computed
            seats.append(request.seat if known and request.seat is not None else self._zero_seat)
        return seats

    def _keep_rows(self, step: StepInput, settled: Settled | None, hidden: Tensor) -> None:
        """Keep the rows that next drafts start from, and the last row of every prompt chunk that another one
        follows, all by one operator, the last of a pass: one that fails before is repeated from the same
        rows. (A pass that settles by a graph has replaced them by then: its guesses may be worse.)"""
        chunks = [
            (s.request, int(end) - 1)
            for s, end in zip(step.scheduled, step.starts[1:], strict=True)
            if not s.commits
        ]
        seats, rows = step.commits.seats, hidden[:0] if settled is None else settled.rows
        if chunks:
            places = integers([request.seat or 0 for request, _ in chunks], hidden.device)
            seats = torch.cat((seats, places))
            rows = torch.cat((rows, hidden[integers([end for _, end in chunks], hidden.device)]))
        if settled is None or not settled.stored:
            self._hidden[seats] = rows
        for scheduled in step.scheduled:
            if not scheduled.commits:
                request = scheduled.request
                self._behind[request].length = request.num_computed + scheduled.num_tokens

    def _collect(self, step: StepInput, settled: Settled, made: list[Commitment]) -> list[PassResult]:
        """Committed tokens of all requests of a pass, empty where one has not reached its root."""
        committed = [PassResult(m.token_ids, draft_depth=m.draft_depth) for m in made]
        self._add_logprobs(step, settled.logits, made, committed)
        results = iter(committed)
        return [next(results) if s.commits else PassResult([]) for s in step.scheduled]

    @staticmethod
    def _add_logprobs(
        step: StepInput, logits: Tensor, made: list[Commitment], committed: list[PassResult]
    ) -> None:
        """Those of all requests that ask for them, in one transfer. logits: [num_nodes_total, vocab]."""
        rows: list[int] = []
        token_ids: list[int] = []
        num_top: list[int] = []
        asking = []
        for first, s, m, tokens in zip(
            step.commits.offsets, step.commits.scheduled, made, committed, strict=True
        ):
            top = s.request.sampling.logprobs
            if top is not None:
                asking.append(tokens)
                rows += [first + node for node in m.nodes]
                token_ids += m.token_ids
                num_top += [top] * len(m.token_ids)
        if not asking:
            return
        found = iter(token_logprobs(logits[rows], token_ids, num_top))
        for tokens in asking:
            tokens.logprobs = [next(found) for _ in tokens.token_ids]
