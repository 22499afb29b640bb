"""Gives draft tokens to the requests of a batch: what the policy allows, and blocks and limits have room for.
Plain Python; never sees a tensor."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

from engine.batch import NO_CHAIN, NOTHING, Allowance, Batch, BatchLimits, Chain, ScheduledRequest
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.request import Request
from engine.speculation.facts import Candidate, Load, StepCost
from engine.speculation.policy import SpeculationPolicy

logger = logging.getLogger(__name__)

_SURE = 0.7  # first guess of an n-gram chain that beats what heads are likely to say
_FEW = 8  # one request of so many may do without its chain
_STEPS_AFTER_FAULT = 1000  # without drafts, where the policy or a chain has raised


class DraftGrants:
    """`requests`: the scheduler's own, by id; `ngrams`: whether to look up what followed a request's last
    tokens before."""

    def __init__(
        self,
        requests: Mapping[str, Request],
        pool: BlockPool,
        policy: SpeculationPolicy,
        limits: BatchLimits,
        ngrams: bool,
    ) -> None:
        self._requests = requests
        self._pool = pool
        self._policy = policy
        self._limits = limits
        self._ngrams = ngrams
        self._asked = self._rests = False  # about the coming step; and what the policy said
        self._num_silent = 0  # steps to go without asking, because of a fault

    def plan(self, batch: Batch, budget: int, num_prompt_tokens: int = 0) -> None:
        """Decide what the requests of a batch draft, `budget` tokens at most, where so many prompt tokens are
        to join them. It may be asked several times about one step, with what is known by then; `settle` ends
        that."""
        self._asked = self._rests = False
        if budget <= 0:
            return
        if not self._attempt(lambda: self._plan(batch, budget, batch.num_tokens + num_prompt_tokens)):
            for scheduled in batch.scheduled:
                scheduled.num_drafts, scheduled.allowance, scheduled.chain = 0, NOTHING, NO_CHAIN

    def settle(self) -> None:
        """The step that was asked about is made."""
        if self._asked:
            self._attempt(self._policy.settle)
        self._num_silent = max(self._num_silent - 1, 0)

    def observe(self, scheduled: ScheduledRequest, committed: Sequence[int]) -> None:
        """Learn from what a request committed."""
        self._attempt(lambda: self._observe(scheduled, committed))

    def observe_step(self, step: StepCost) -> None:
        """Learn from how long a step without prompts took."""
        self._attempt(lambda: self._policy.observe_step(step))

    def _attempt(self, action: Callable[[], None]) -> bool:
        """Guessing is no reason to fail: where it raises, nobody drafts for a while."""
        if self._num_silent:
            return False
        try:
            action()
        except Exception:
            logger.exception("Drafts cannot be planned: the next %d steps go without.", _STEPS_AFTER_FAULT)
            self._num_silent = _STEPS_AFTER_FAULT
        return not self._num_silent

    def _observe(self, scheduled: ScheduledRequest, committed: Sequence[int]) -> None:
        request = self._requests[scheduled.request.request_id]
        request.ngrams.observe(scheduled.chain, committed)
        # An answer's end cuts off what might have been right.
        if scheduled.asks_heads and request.finish_reason is None:
            self._policy.observe(request.acceptance, scheduled.allowance.expected, scheduled.num_accepted)

    def join_chains(self, batch: Batch) -> bool:
        """Let n-gram guesses join a batch that was planned before its requests' last tokens were known. False
        where they have more to say than its trees have room for."""
        if not self._ngrams or self._rests or self._num_silent:
            return True
        left_out: list[ScheduledRequest] = []
        joined = self._attempt(lambda: left_out.extend(filter(self._leaves_out_chain, batch.scheduled)))
        return joined and len(left_out) * _FEW <= len(batch.scheduled)

    def _leaves_out_chain(self, scheduled: ScheduledRequest) -> bool:
        limit = scheduled.num_drafts or self._limit(scheduled)
        if not limit:
            return False
        scheduled.chain = chain = self._chain(self._requests[scheduled.request.request_id], limit)
        return bool(chain.gains) and (scheduled.num_drafts == 0 or chain.gains[0] >= _SURE)

    def _plan(self, batch: Batch, budget: int, num_tokens: int) -> None:
        committing = batch.scheduled
        limits = [(scheduled, self._limit(scheduled)) for scheduled in committing]
        drafting = [(scheduled, limit) for scheduled, limit in limits if limit > 0]
        if drafting:
            self._asked = True
            self._rests = self._policy.rests(len(committing))
        if drafting and not self._rests:
            candidates = [self._candidate(scheduled, limit) for scheduled, limit in drafting]
            num_keys = sum(scheduled.num_computed for scheduled in committing)
            load = Load(len(committing), num_tokens, num_keys, budget)
            allowances = self._policy.plan(load, candidates)
            for (scheduled, _), allowance in zip(drafting, allowances, strict=True):
                budget -= self._grant(scheduled, allowance, budget)
        batch.speculation = self._policy.report()

    def _grant(self, scheduled: ScheduledRequest, allowance: Allowance, budget: int) -> int:
        """How many draft tokens there is room for."""
        request = scheduled.request
        size = min(allowance.most, budget)  # no policy's mistake may overfill a pass
        num_known = len(request.token_ids) + scheduled.most_gained
        if not self._pool.extend(request.block_table, num_known + size):
            # Drafts never push another request out: they make do with the room there is.
            size = len(request.block_table) * self._pool.block_size - num_known
        scheduled.num_drafts, scheduled.allowance = size, allowance.granted(size)
        return size

    def _candidate(self, scheduled: ScheduledRequest, limit: int) -> Candidate:
        request = self._requests[scheduled.request.request_id]
        if self._ngrams and not scheduled.most_gained:
            scheduled.chain = self._chain(request, limit)
        return Candidate(request.acceptance, limit, scheduled.chain.gains, scheduled.num_computed)

    @staticmethod
    def _chain(request: Request, limit: int) -> Chain:
        request.ngrams.extend(request.token_ids)
        return request.ngrams.guess(request.token_ids, min(limit, request.num_remaining - 1))

    def _limit(self, scheduled: ScheduledRequest) -> int:
        request = self._requests[scheduled.request.request_id]
        speculation = request.sampling.speculation
        if not (speculation.enabled and request.has_hidden):
            return 0
        if request.num_remaining <= 1:  # the one token left comes without a draft
            return 0
        # A draft needs a logical position.
        positions = self._limits.max_model_len - len(request.token_ids) - scheduled.most_gained
        limit = max(0, min(self._limits.max_drafts, positions))
        most = speculation.max_draft_tokens
        return limit if most is None else min(limit, most)
