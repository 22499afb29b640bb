"""Gives draft tokens to the requests of a batch: what the policy allows, and blocks and limits have room for.
Plain Python; never sees a tensor."""

from __future__ import annotations

from engine.scheduling.batch import Batch, ScheduledRequest
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.drafting import Candidate, Load
from engine.scheduling.ngrams import Chain
from engine.scheduling.request import Request
from engine.scheduling.speculation import SpeculationPolicy

_SURE = 0.7  # first guess of an n-gram chain that beats what heads are likely to say
_FEW = 8  # one request of so many may do without its chain


class DraftPlanner:
    """`max_drafts`, `max_model_len`: of one request; `ngrams`: whether to look up what followed a request's
    last tokens before."""

    def __init__(
        self, pool: BlockPool, policy: SpeculationPolicy, max_drafts: int, max_model_len: int, ngrams: bool
    ) -> None:
        self._pool = pool
        self._policy = policy
        self._max_drafts, self._max_model_len = max_drafts, max_model_len
        self._ngrams = ngrams
        self._rests: bool | None = None  # what the policy said of the coming step, where it was asked already

    def plan(self, batch: Batch, budget: int) -> None:
        """Decide what the requests of a batch draft, `budget` tokens at most. It may be asked several times
        about one step, with what is known by then; `settle` ends that."""
        committing = [scheduled for scheduled in batch.scheduled if scheduled.commits]
        if committing:
            self._plan(batch, committing, budget)
        batch.speculation = self._policy.report()

    def settle(self) -> None:
        """The step that was asked about is made."""
        self._rests = None

    def join_chains(self, batch: Batch) -> bool:
        """Let n-gram guesses join a batch that was planned before its requests' last tokens were known. False
        where they have more to say than its trees have room for."""
        if not self._ngrams or self._rests:
            return True
        num_left_out = 0
        for scheduled in batch.scheduled:
            limit = scheduled.num_drafts or self._limit(scheduled)
            if not limit:
                continue
            scheduled.chain = chain = self._chain(scheduled.request, limit)
            if chain.gains and (scheduled.num_drafts == 0 or chain.gains[0] >= _SURE):
                num_left_out += 1
        return num_left_out * _FEW <= len(batch.scheduled)

    def _plan(self, batch: Batch, committing: list[ScheduledRequest], budget: int) -> None:
        limits = [(scheduled, self._limit(scheduled)) for scheduled in committing]
        drafting = [scheduled for scheduled, limit in limits if limit > 0]
        if drafting and self._rests is None:
            self._rests = self._policy.rests(len(committing))
        if self._rests:
            return
        candidates = [self._candidate(scheduled, limit) for scheduled, limit in limits if limit > 0]
        num_keys = sum(scheduled.base for scheduled in committing)
        allowances = self._policy.plan(Load(len(committing), batch.num_tokens, num_keys), candidates)
        for scheduled, allowance in zip(drafting, allowances, strict=True):
            request = scheduled.request
            scheduled.allowance = allowance
            size = min(allowance.most, budget)
            num_known = len(request.token_ids) + scheduled.most_gained
            if not self._pool.extend(request.block_table, num_known + size):
                # Drafts never push another request out: they make do with the room there is.
                size = len(request.block_table) * self._pool.block_size - num_known
            scheduled.num_drafts = size
            budget -= size

    def _candidate(self, scheduled: ScheduledRequest, limit: int) -> Candidate:
        request = scheduled.request
        if self._ngrams and not scheduled.most_gained:
            scheduled.chain = self._chain(request, limit)
        return Candidate(request.acceptance, limit, scheduled.chain.gains, scheduled.base)

    @staticmethod
    def _chain(request: Request, limit: int) -> Chain:
        request.ngrams.extend(request.token_ids)
        return request.ngrams.guess(request.token_ids, min(limit, request.num_remaining - 1))

    def _limit(self, scheduled: ScheduledRequest) -> int:
        request = scheduled.request
        speculation = request.sampling.speculation
        if not (speculation.enabled and request.has_hidden):
            return 0
        if request.num_remaining <= 1:  # the one token left comes without a draft
            return 0
        # A draft needs a logical position.
        positions = self._max_model_len - len(request.token_ids) - scheduled.most_gained
        limit = max(0, min(self._max_drafts, positions))
        return limit if speculation.max_nodes is None else min(limit, speculation.max_nodes)
