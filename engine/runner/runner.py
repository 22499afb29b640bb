"""Everything of a step that happens on the device: draft, forward pass, verification, compaction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from engine.backends.backend import Backend
from engine.backends.kv_cache import KVCache
from engine.batch import Batch, PassResult, ScheduledRequest
from engine.model.running import RunningDecoder
from engine.runner.commit import read_results
from engine.runner.device import torch_threads
from engine.runner.drafter import Drafter, NoDrafter, Proposal
from engine.runner.graphs import StepGraph, StepGraphs
from engine.runner.passes import EagerPass, StepPass
from engine.runner.proposing import levels_of, limit_drafts, propose
from engine.runner.sampling_table import Demand
from engine.runner.transfer import to_host
from engine.runner.work import Work

Collect = Callable[[], list[PassResult]]


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
        self.backend, self.decoder, self.cache = backend, decoder, cache
        self.work = Work(backend, decoder, cache, drafter or NoDrafter(), max_num_seqs)
        self._eager = EagerPass(self.work)
        self._graphs = StepGraphs()
        self._prepared: _Prepared | None = None
        self.drafter.attach(decoder.config, cache)

    @property
    def drafter(self) -> Drafter:
        return self.work.drafter

    @drafter.setter
    def drafter(self, drafter: Drafter) -> None:
        """Run passes with another one, of no other taps."""
        self.work.drafter = drafter

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
        demand = self.work.sampler.prepare(batch.scheduled)
        way, proposal = self._choose(batch, demand)
        done = way.run(batch, proposal, self.work.hidden.before(batch.scheduled), demand)
        settled = done.settled
        packed = None if settled is None else to_host(settled.packed)

        def collect() -> list[PassResult]:
            with torch.inference_mode(), torch_threads(self.backend.torch_threads):
                if settled is None or packed is None:  # prompts' chunks alone
                    results, ends = [PassResult([]) for _ in batch.scheduled], None
                else:
                    results = read_results(done.step, packed(), settled.logits)
                    ends = None if settled.stored else settled.rows
                self.work.hidden.keep(done.step, done.hidden, ends, results)
            return results

        return collect

    @torch.inference_mode()
    def prepare(self, batch: Batch) -> None:
        """Lay out a pass that will be launched next, unless another is, while the one before it runs. Its
        requests all decode, and gain `most_gained` tokens at most before."""
        self._prepared = None
        if self.drafter.capturable:
            graph = self._told_graph(batch, self.work.sampler.prepare(batch.scheduled))
            self._prepared = None if graph is None else _Prepared(batch.scheduled, graph)

    def draft(self, batch: Batch) -> None:
        """Only the guesses of a pass, to measure what they cost."""
        with torch.inference_mode(), torch_threads(self.backend.torch_threads):
            way, proposal = self._choose(batch, self.work.sampler.prepare(batch.scheduled))
            way.complete(batch, proposal, self.work.hidden.before(batch.scheduled))

    def _choose(self, batch: Batch, demand: Demand) -> tuple[StepPass, Proposal | None]:
        """The way to run a pass, told of it, and the guesses that it does not make itself; from then on it is
        known how large trees are."""
        prepared, self._prepared = self._prepared, None
        if prepared is not None and prepared.scheduled is batch.scheduled:
            return prepared.graph, None
        graph = self._told_graph(batch, demand)
        if graph is not None:
            return graph, None
        proposal = propose(self.work, batch, demand)
        graph = self._graphs.find(batch)  # trees may have become smaller
        if graph is None:
            return self._eager, proposal
        graph.prepare(batch, None, demand)
        return graph, proposal

    def _told_graph(self, batch: Batch, demand: Demand) -> StepGraph | None:
        """Leave out drafts that nobody guesses, and tell a graph of a pass that it can make all guesses of;
        None where none can."""
        limit_drafts(self.drafter, batch)
        graph = self._graphs.find(batch)
        if graph is None:
            return None
        levels = levels_of(self.drafter, batch)
        drafts = any(s.num_drafts for s in batch.scheduled)
        if drafts and (graph.num_levels is None or levels > graph.num_levels):
            return None
        graph.prepare(batch, levels if drafts else None, demand)
        return graph
