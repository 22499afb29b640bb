"""Everything of a step that happens on the device: draft, forward pass, verification, compaction."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from engine.model.decoder import Decoder
from engine.native.decoder import NativeDecoder
from engine.runner.attention import paged_attention
from engine.runner.drafter import Drafter, DraftInput, Proposal
from engine.runner.kv_cache import KVCache
from engine.runner.per_request import PerRequest
from engine.runner.sampler import Sampler, token_logprobs
from engine.runner.step_input import CommitRows, StepInput, build_step
from engine.scheduling.batch import Batch, CommittedTokens, ScheduledRequest
from trees.verify import DraftTrees, deepest_accepted


@dataclass
class _Behind:
    """`length`: how many positions a request had computed when its hidden row was kept."""

    length: int = 0


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
        self._sampler = Sampler(config.vocab_size, config.eos_token_ids)
        self._hidden = decoder.embedding.new_zeros(max_num_seqs, config.hidden_size)
        self._behind: PerRequest[_Behind] = PerRequest(lambda _: _Behind())
        if drafter is not None:
            drafter.attach(config, cache)

    @property
    def trims(self) -> bool:
        """Whether trees may turn out smaller than they were planned."""
        return self.drafter is not None and self.drafter.trims

    def resize_cache(self, num_blocks: int) -> None:
        """Give the cache another size; what it held is gone."""
        self.cache.resize(num_blocks)
        if self.drafter is not None:
            self.drafter.attach(self.decoder.config, self.cache)

    @torch.inference_mode()
    def execute(self, batch: Batch) -> list[CommittedTokens]:
        """Run one pass; entry i of the result belongs to `batch.scheduled[i]`.

        Lowers `num_drafts` of requests that the drafter has fewer guesses for.
        """
        step, trees = self._draft(batch)
        config, commits = self.decoder.config, step.commits
        attention = paged_attention(step, self.cache, config.num_heads, config.num_kv_heads)
        hidden = self.decoder(step.token_ids, step.positions, attention)
        if self.drafter is not None:
            self.drafter.observe(step, trees, hidden, partial(self._rows_before, step))
        results = [CommittedTokens([]) for _ in batch.scheduled]
        if commits.scheduled:
            results = self._commit(batch, step, trees, hidden)
        if self.drafter is not None:
            self._keep_chunk_rows(step, hidden)
        return results

    def _commit(
        self, batch: Batch, step: StepInput, trees: DraftTrees, hidden: Tensor
    ) -> list[CommittedTokens]:
        """Judge the trees of those that commit. hidden: [num_tokens, hidden]."""
        commits = step.commits
        hidden = hidden.index_select(0, commits.rows)
        logits = self.decoder.logits(hidden)
        verdict = self._sampler.judge(logits, commits, trees)
        last = deepest_accepted(verdict.edges, trees)
        self._compact(commits, last, trees)
        results = self._collect(batch, commits, last, trees, verdict.targets, logits)
        # Last of all, as are the rows of chunks: a pass that fails before is repeated from the same rows.
        self._hidden[commits.state_slots] = hidden[commits.first_row + last]
        for scheduled, result in zip(batch.scheduled, results, strict=True):
            if scheduled.commits:
                request = scheduled.request
                self._behind[request].length = len(request.token_ids) + len(result.token_ids) - 1
        return results

    @torch.inference_mode()
    def draft(self, batch: Batch) -> None:
        """Only the guesses of a pass, to measure what they cost."""
        self._draft(batch)

    def _draft(self, batch: Batch) -> tuple[StepInput, DraftTrees]:
        """The pass of a batch with its trees filled in."""
        if self.drafter is not None:
            for scheduled in batch.scheduled:
                if scheduled.num_drafts:
                    scheduled.num_drafts = self.drafter.limit(scheduled)
        proposal = self._propose([s for s in batch.scheduled if s.num_drafts])
        step = build_step(batch, self.cache.block_size, self._device)
        trees = self._trees(step.commits, proposal)
        step.fill(trees)
        return step, trees

    def _rows_before(self, step: StepInput) -> Tensor:
        """The hidden row of the token before each request's first in this pass, [num_requests, hidden], zeros
        where it is not known."""
        requests = [scheduled.request for scheduled in step.scheduled]
        slots = torch.tensor([request.slot for request in requests], dtype=torch.int64, device=self._device)
        before = self._hidden[slots]
        unknown = [
            index
            for index, request in enumerate(requests)
            if not request.num_computed or self._behind[request].length != request.num_computed
        ]
        if unknown:
            before[unknown] = 0.0
        return before

    def _keep_chunk_rows(self, step: StepInput, hidden: Tensor) -> None:
        """Keep the last row of every prompt chunk that another one follows."""
        for scheduled, end in zip(step.scheduled, step.starts[1:], strict=True):
            if not scheduled.commits:
                request = scheduled.request
                self._hidden[request.slot] = hidden[int(end) - 1]
                self._behind[request].length = request.num_computed + scheduled.num_tokens

    def _propose(self, drafting: list[ScheduledRequest]) -> Proposal | None:
        """Guesses for these requests; lowers the number of drafts of those that get fewer."""
        if not drafting or self.drafter is None:
            return None
        requests = [scheduled.request for scheduled in drafting]
        slots = torch.tensor([request.slot for request in requests], device=self._device)
        draft = DraftInput(
            requests=requests,
            chains=[scheduled.chain for scheduled in drafting],
            budgets=[scheduled.num_drafts + 1 for scheduled in drafting],
            least=[scheduled.allowance.least for scheduled in drafting],
            chain_only=not any(scheduled.guesses for scheduled in drafting),
            hidden=self._hidden[slots],
            roots=torch.tensor([request.token_ids[-1] for request in requests], device=self._device),
        )
        proposal = self.drafter.propose(draft)
        if proposal.num_nodes is not None:
            for scheduled, num_nodes in zip(drafting, proposal.num_nodes, strict=True):
                scheduled.num_drafts = num_nodes - 1
            grown = [index for index, num_nodes in enumerate(proposal.num_nodes) if num_nodes > 1]
            if len(grown) < len(drafting):
                proposal = replace(proposal, tokens=proposal.tokens[grown], parents=proposal.parents[grown])
        return proposal

    def _trees(self, commits: CommitRows, proposal: Proposal | None) -> DraftTrees:
        """Trees of all that commit, [num_commits, max_nodes]: of most, or of many, the root alone."""
        tokens = torch.nn.functional.pad(commits.roots.unsqueeze(1), (0, commits.max_nodes - 1))
        parents, max_depth = torch.zeros_like(tokens), 0
        if commits.drafting and proposal is None:  # only when costs are measured: all nodes guess token 0
            max_depth = 1
        elif commits.drafting and proposal is not None:
            all_draft = len(commits.drafting) == len(commits.scheduled)
            members = slice(None) if all_draft else torch.tensor(commits.drafting, device=self._device)
            # The roots are known, whatever a drafter makes of them.
            inner = slice(1, commits.max_nodes)
            tokens[members, 1:] = proposal.tokens[:, inner]
            parents[members, 1:] = proposal.parents[:, inner]
            max_depth = proposal.max_depth
        return DraftTrees.build(tokens, parents, commits.num_nodes, max_depth)

    def _compact(self, commits: CommitRows, last: Tensor, trees: DraftTrees) -> None:
        """Move the K and V of accepted nodes to the logical positions base + 1, base + 2, ..."""
        if commits.max_nodes == 1:
            return
        paths = trees.paths_to(last)  # [num_commits, depth + 1]
        order = torch.arange(paths.shape[1], device=paths.device)
        depths = trees.depths.gather(1, last.unsqueeze(1))
        # A node that already lies where it belongs, and the repeated tail of a path, stay: the tail would
        # otherwise write over positions the path has not earned.
        moves = (order <= depths) & (paths != order)
        destinations = commits.node_slots[:, : paths.shape[1]]
        sources = torch.where(moves, commits.node_slots.gather(1, paths), destinations)
        self.cache.move(sources, destinations)

    def _collect(
        self,
        batch: Batch,
        commits: CommitRows,
        last: Tensor,
        trees: DraftTrees,
        targets: Tensor,
        logits: Tensor,
    ) -> list[CommittedTokens]:
        """Bring the committed tokens to the host, in one transfer."""
        end, paths = last.unsqueeze(1), trees.paths_to(last)
        facts = (trees.tree_depths.unsqueeze(1), trees.depths.gather(1, end), targets.gather(1, end))
        packed = torch.cat((*facts, paths, trees.tokens.gather(1, paths)), dim=1).tolist()
        results = []
        for first, scheduled, row in zip(commits.offsets, commits.scheduled, packed, strict=True):
            draft_depth, num_accepted, bonus_token = row[:3]
            nodes, path = row[3 : 3 + paths.shape[1]], row[3 + paths.shape[1] :]
            token_ids = [*path[1 : num_accepted + 1], bonus_token]
            logprobs = None
            num_top = scheduled.request.sampling.logprobs
            if num_top is not None:
                rows = [first + node for node in nodes[: num_accepted + 1]]
                logprobs = token_logprobs(logits[rows], token_ids, num_top)
            results.append(CommittedTokens(token_ids, logprobs, draft_depth))
        committed = iter(results)
        return [next(committed) if s.commits else CommittedTokens([]) for s in batch.scheduled]
