"""Everything of a step that happens on the device: draft, forward pass, verification, compaction."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.model.decoder import Decoder
from engine.runner.attention import PagedAttention
from engine.runner.drafter import Drafter
from engine.runner.kv_cache import KVCache
from engine.runner.sampler import Sampler, token_logprobs
from engine.runner.step_input import CommitRows, StepInput, StepInputBuilder
from engine.scheduling.batch import Batch, CommittedTokens
from trees.family import TreeFamily
from trees.verify import TreeTables, deepest_accepted


class Runner:
    """Executes batches. Between steps it keeps the KV cache and one hidden row per running request, the row
    that request's next draft starts from."""

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        family: TreeFamily,
        drafter: Drafter | None,
        max_num_seqs: int,
    ) -> None:
        self.decoder = decoder
        self.cache = cache
        self.family = family
        self.drafter = drafter
        config = decoder.config
        self._device = decoder.embedding.device
        self._builder = StepInputBuilder(family, cache.block_size, self._device)
        self._sampler = Sampler(config.vocab_size, config.eos_token_ids)
        self._tables = TreeTables.build(family, self._device)
        self._hidden = decoder.embedding.new_zeros(max_num_seqs, config.hidden_size)

    @torch.inference_mode()
    def execute(self, batch: Batch) -> list[CommittedTokens]:
        """Run one pass; entry i of the result belongs to `batch.scheduled[i]`."""
        step = self._builder.build(batch)
        commits = step.commits
        tables = self._tables.prefix(commits.max_nodes)
        tokens = self._fill_trees(step, tables)
        config = self.decoder.config
        attention = PagedAttention(step, self.cache, config.num_heads, config.num_kv_heads)
        hidden = self.decoder(step.token_ids, step.positions, attention)
        if not commits.scheduled:
            return [CommittedTokens([]) for _ in batch.scheduled]
        hidden = hidden.index_select(0, commits.rows)
        logits = self.decoder.logits(hidden)
        verdict = self._sampler.judge(logits, commits, tokens, tables)
        last = deepest_accepted(verdict.edges, commits.num_nodes, tables)
        self._compact(commits, last, tables)
        self._hidden[commits.state_slots] = hidden[commits.first_row + last]
        return self._collect(batch, commits, last, tokens, verdict.targets, tables, logits)

    @torch.inference_mode()
    def draft_for(self, num_requests: int) -> None:
        """Draft whole trees for the first `num_requests` state rows, to measure what it costs."""
        if self.drafter is not None:
            roots = torch.zeros(num_requests, dtype=torch.int64, device=self._device)
            self.drafter.propose(self._hidden[:num_requests], roots, self._tables)

    def _fill_trees(self, step: StepInput, tables: TreeTables) -> Tensor:
        """Put the drafter's guesses into the flat row; returns the trees, [num_commits, max_nodes]."""
        commits = step.commits
        if commits.max_nodes == 1:
            return commits.roots.unsqueeze(1)
        if self.drafter is None:  # only when costs are measured: every node guesses token 0
            return commits.roots.new_zeros(len(commits.scheduled), commits.max_nodes)
        if commits.drafting is None:
            tokens = self.drafter.propose(self._hidden[commits.state_slots], commits.roots, tables)
        else:
            tokens = commits.roots.unsqueeze(1).repeat(1, commits.max_nodes)
            slots, roots = commits.state_slots[commits.drafting], commits.roots[commits.drafting]
            tokens[commits.drafting] = self.drafter.propose(self._hidden[slots], roots, tables)
        step.token_ids[commits.rows] = tokens[commits.request, commits.node]
        return tokens

    def _compact(self, commits: CommitRows, last: Tensor, tables: TreeTables) -> None:
        """Move the K and V of accepted nodes to the logical positions base + 1, base + 2, ..."""
        if commits.max_nodes == 1:
            return
        paths = tables.paths[last]  # [num_commits, depth + 1]
        order = torch.arange(paths.shape[1], device=paths.device)
        # A node that already lies where it belongs, and the repeated tail of a path, stay: the tail would
        # otherwise write over positions the path has not earned.
        moves = (order <= tables.depths[last].unsqueeze(1)) & (paths != order)
        sources = commits.node_slots.gather(1, paths)[moves]
        destinations = commits.node_slots[:, : paths.shape[1]][moves]
        if sources.numel():
            self.cache.move(sources, destinations)

    def _collect(
        self,
        batch: Batch,
        commits: CommitRows,
        last: Tensor,
        tokens: Tensor,
        targets: Tensor,
        tables: TreeTables,
        logits: Tensor,
    ) -> list[CommittedTokens]:
        """Bring the committed tokens to the host, in one transfer."""
        index = torch.arange(len(last), device=last.device)
        bonus = targets[index, last]
        path_tokens = tokens.gather(1, tables.paths[last])
        packed = torch.cat((last.unsqueeze(1), bonus.unsqueeze(1), path_tokens), dim=1).tolist()
        results = []
        for number, (scheduled, row) in enumerate(zip(commits.scheduled, packed, strict=True)):
            node, bonus_token, path = row[0], row[1], row[2:]
            token_ids = [*path[1 : self.family.depths[node] + 1], bonus_token]
            logprobs = None
            num_top = scheduled.request.sampling.logprobs
            if num_top is not None:
                nodes = [commits.offsets[number] + n for n in self.family.path_nodes[node]]
                logprobs = token_logprobs(logits[nodes], token_ids, num_top)
            results.append(CommittedTokens(token_ids, logprobs))
        committed = iter(results)
        return [next(committed) if s.commits else CommittedTokens([]) for s in batch.scheduled]
