"""Everything of a step that happens on the device: draft, forward pass, verification, compaction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from engine.model.decoder import Attention, Decoder
from engine.native.decoder import NativeDecoder
from engine.runner.attention import paged_attention
from engine.runner.commit import compact, pack, unpack
from engine.runner.device import torch_threads
from engine.runner.drafter import Drafter, Proposal, RootRows
from engine.runner.drafting import levels_of, limit_drafts, make_trees, propose
from engine.runner.graphs import StepGraph, StepGraphs
from engine.runner.kv_cache import KVCache
from engine.runner.per_request import PerRequest
from engine.runner.sampler import Sampler, is_plain, token_logprobs
from engine.runner.step_input import CommitRows, StepInput
from engine.runner.step_layout import build_step
from engine.runner.transfer import to_host
from engine.scheduling.batch import Batch, CommittedTokens
from trees.select import Chains
from trees.verify import DraftTrees, deepest_accepted

Collect = Callable[[], list[CommittedTokens]]


@dataclass
class _Behind:
    """`length`: how many positions a request had computed when its hidden row was kept."""

    length: int = 0


@dataclass(frozen=True)
class _Prepared:
    """A pass that a graph has been told of before it is known where its requests stand."""

    batch: Batch
    graph: StepGraph


@dataclass(frozen=True)
class _Judged:
    packed: Tensor  # what the host has to know, see `engine.runner.commit.pack`
    logits: Tensor  # [num_nodes_total, vocab]
    rows: Tensor  # [num_commits, hidden], each request's last committed node's


class Runner:
    """Executes batches. Between steps it keeps the KV cache and one hidden row per running request, the row
    that request's next draft starts from."""

    def __init__(
        self, decoder: Decoder | NativeDecoder, cache: KVCache, drafter: Drafter | None, max_num_seqs: int
    ) -> None:
        self.decoder = decoder
        self.cache = cache
        self.drafter = drafter
        config = decoder.config
        self._device = decoder.embedding.device
        # Beside our own kernels torch has little to do, for which waiting threads cost more than they save.
        self._torch_threads = 1 if isinstance(decoder, NativeDecoder) else None
        self._sampler = Sampler(config.vocab_size, config.eos_token_ids)
        # Two more rows: what padding writes, and zeros.
        self._hidden = decoder.embedding.new_zeros(max_num_seqs + 2, config.hidden_size)
        self.spare_slot, self._zero_slot = max_num_seqs, max_num_seqs + 1
        self._graphs = StepGraphs()
        self._prepared: _Prepared | None = None
        self._behind: PerRequest[_Behind] = PerRequest(lambda _: _Behind())
        if drafter is not None:
            drafter.attach(config, cache)

    @property
    def trims(self) -> bool:
        """Whether trees may turn out smaller than they were planned."""
        return self.drafter is not None and self.drafter.trims

    def use_graphs(self, graphs: StepGraphs) -> None:
        """Run what passes they hold by them. Their work is this runner's."""
        self._graphs = graphs

    def resize_cache(self, num_blocks: int) -> None:
        """Give the cache another size; what it held is gone, and so are graphs."""
        self._graphs = StepGraphs()
        self.cache.resize(num_blocks)
        if self.drafter is not None:
            self.drafter.attach(self.decoder.config, self.cache)

    @property
    def works_by_itself(self) -> bool:
        """Whether passes go on while the host does something else."""
        return self._device.type == "cuda" and len(self._graphs) > 0

    def execute(self, batch: Batch) -> list[CommittedTokens]:
        """Run one pass; entry i of the result belongs to `batch.scheduled[i]`.

        Lowers `num_drafts` of requests that the drafter has fewer guesses for.
        """
        return self.launch(batch)()

    def launch(self, batch: Batch) -> Collect:
        """The same in two parts: what is returned waits for the result. Until it has been called, no other
        pass may be launched, but one may be prepared."""
        with torch.inference_mode(), torch_threads(self._torch_threads):
            return self._launch(batch)

    def _launch(self, batch: Batch) -> Collect:
        prepared, self._prepared = self._prepared, None
        if prepared is not None and prepared.batch is batch:
            return self._replay(prepared.graph, batch, None)
        graph, proposal = self._draft(batch)
        if graph is not None:
            graph.prepare(batch, min(levels_of(self.drafter, batch), graph.num_levels))
            return self._replay(graph, batch, proposal)
        results = self._run(batch, proposal)
        return lambda: results

    @torch.inference_mode()
    def prepare(self, batch: Batch) -> None:
        """Lay out a pass that will be launched next, unless another is, while the one before it runs. Its
        requests all decode, and gain `most_gained` tokens at most before."""
        self._prepared = None
        if self.drafter is not None and not self.drafter.observes_tensors:
            return
        limit_drafts(self.drafter, batch)
        levels = levels_of(self.drafter, batch)
        graph = self._graphs.find(batch)
        guessed = levels > 0 or not any(s.num_drafts for s in batch.scheduled)
        if graph is not None and guessed and levels <= graph.num_levels:
            graph.prepare(batch, levels)
            self._prepared = _Prepared(batch, graph)

    def _run(self, batch: Batch, proposal: Proposal | None) -> list[CommittedTokens]:
        """Without a graph."""
        step, trees = self._fill(batch, proposal)
        config = self.decoder.config
        attention = paged_attention(step, self.cache, config.num_heads, config.num_kv_heads)
        hidden = self.decoder(step.token_ids, step.positions, attention)
        self._observe(step, trees, hidden)
        results = [CommittedTokens([]) for _ in batch.scheduled]
        if step.commits.scheduled:
            results = self._commit(batch, step, trees, hidden)
        if self.drafter is not None:
            self._keep_chunk_rows(step, hidden)
        return results

    def _replay(self, graph: StepGraph, batch: Batch, proposal: Proposal | None) -> Collect:
        """By a graph that has been prepared."""
        step = graph.complete(batch, proposal, self._before_slots(batch))
        trees, hidden = graph.forward(step)
        if self.drafter is not None and not self.drafter.observes_tensors:
            self._observe(step, trees, hidden)
        if not all(is_plain(scheduled.request.sampling) for scheduled in batch.scheduled):
            results = self._commit(batch, step, trees, hidden)
            return lambda: results
        packed = to_host(graph.settle(step))
        return lambda: self._collect(batch, step.commits, packed(), None)

    def grow(
        self, step: StepInput, chains: Chains, levels: int, attention: Attention | None
    ) -> tuple[Tensor, Tensor]:
        """See `engine.runner.graphs.Work`."""
        if self.drafter is None:
            raise RuntimeError("there is nobody to guess")
        commits = step.commits
        rows = RootRows(
            hidden=self._hidden[commits.state_slots],
            roots=commits.roots,
            positions=step.positions[step.first_rows],
            num_nodes=commits.num_nodes,
            max_nodes=commits.max_nodes,
            levels=levels,
            chains=chains,
            attention=attention,
        )
        return self.drafter.grow(rows)

    def forward(self, step: StepInput, trees: DraftTrees, attention: Attention) -> Tensor:
        """See `engine.runner.graphs.Work`."""
        step.fill(trees)
        hidden: Tensor = self.decoder(step.token_ids, step.positions, attention)
        if self.drafter is not None and self.drafter.observes_tensors:
            self._observe(step, trees, hidden)
        return hidden

    def settle(self, step: StepInput, trees: DraftTrees, hidden: Tensor) -> Tensor:
        """See `engine.runner.graphs.Work`."""
        judged = self._judge(step.commits, trees, hidden)
        self._hidden[step.commits.state_slots] = judged.rows
        return judged.packed

    def _judge(self, commits: CommitRows, trees: DraftTrees, hidden: Tensor) -> _Judged:
        """Draw targets, accept and compact. hidden: [num_tokens, hidden]."""
        hidden = hidden.index_select(0, commits.rows)
        logits = self.decoder.logits(hidden)
        verdict = self._sampler.judge(logits, commits, trees)
        last = deepest_accepted(verdict.edges, trees)
        compact(self.cache, commits, last, trees)
        return _Judged(pack(trees, last, verdict.targets), logits, hidden[commits.first_row + last])

    def _commit(
        self, batch: Batch, step: StepInput, trees: DraftTrees, hidden: Tensor
    ) -> list[CommittedTokens]:
        judged = self._judge(step.commits, trees, hidden)
        results = self._collect(batch, step.commits, judged.packed, judged.logits)
        # Last of all, as are the rows of chunks: a pass that fails before is repeated from the same rows. One
        # that settles by a graph has replaced them by then: its guesses may be worse.
        self._hidden[step.commits.state_slots] = judged.rows
        return results

    def _observe(self, step: StepInput, trees: DraftTrees, hidden: Tensor) -> None:
        if self.drafter is not None:
            self.drafter.observe(
                step, trees, hidden, partial(self._hidden.index_select, 0, step.before_slots)
            )

    def draft(self, batch: Batch) -> None:
        """Only the guesses of a pass, to measure what they cost."""
        with torch.inference_mode(), torch_threads(self._torch_threads):
            self._guess(batch)

    def _guess(self, batch: Batch) -> None:
        graph, proposal = self._draft(batch)
        if graph is None:
            self._fill(batch, proposal)
        else:
            graph.prepare(batch, min(levels_of(self.drafter, batch), graph.num_levels))
            graph.complete(batch, proposal, self._before_slots(batch))

    def _draft(self, batch: Batch) -> tuple[StepGraph | None, Proposal | None]:
        """The graph for a pass, and what the drafter guesses where the graph does not do it; from then on it
        is known how large trees are."""
        limit_drafts(self.drafter, batch)
        if levels_of(self.drafter, batch):
            graph = self._graphs.find(batch)
            if graph is not None and graph.num_levels:
                return graph, None
        proposal = propose(self.drafter, batch, self._hidden)
        return self._graphs.find(batch), proposal

    def _fill(self, batch: Batch, proposal: Proposal | None) -> tuple[StepInput, DraftTrees]:
        """The pass of a batch with its trees filled in."""
        step = build_step(batch, self.cache.block_size, self._device, self._before_slots(batch))
        trees = make_trees(step.commits, proposal)
        step.fill(trees)
        return step, trees

    def _before_slots(self, batch: Batch) -> list[int]:
        """Where the hidden row of the token before each request's first in this pass is kept; zeros lie where
        it is not known."""
        slots = []
        for scheduled in batch.scheduled:
            request = scheduled.request
            known = request.num_computed and self._behind[request].length == request.num_computed
            slots.append(request.slot if known and request.slot is not None else self._zero_slot)
        return slots

    def _keep_chunk_rows(self, step: StepInput, hidden: Tensor) -> None:
        """Keep the last row of every prompt chunk that another one follows."""
        for scheduled, end in zip(step.scheduled, step.starts[1:], strict=True):
            if not scheduled.commits:
                request = scheduled.request
                self._hidden[request.slot] = hidden[int(end) - 1]
                self._behind[request].length = request.num_computed + scheduled.num_tokens

    def _collect(
        self, batch: Batch, commits: CommitRows, packed: Tensor, logits: Tensor | None
    ) -> list[CommittedTokens]:
        """Bring the committed tokens to the host, in one transfer.

        packed: as `pack` returns it; logits: [num_nodes_total, vocab], where requests ask for logprobs.
        """
        committed = []
        for first, scheduled, made in zip(commits.offsets, commits.scheduled, unpack(packed), strict=True):
            request, logprobs = scheduled.request, None
            num_top = request.sampling.logprobs
            if num_top is not None and logits is not None:
                rows = logits[[first + node for node in made.nodes]]
                logprobs = token_logprobs(rows, made.token_ids, num_top)
            committed.append(CommittedTokens(made.token_ids, logprobs, made.draft_depth))
        for scheduled, tokens in zip(commits.scheduled, committed, strict=True):  # nothing can fail any more
            request = scheduled.request
            self._behind[request].length = len(request.token_ids) + len(tokens.token_ids) - 1
        results = iter(committed)
        return [next(results) if s.commits else CommittedTokens([]) for s in batch.scheduled]
