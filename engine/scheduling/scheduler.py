"""Decides what each step computes and takes in what it brought. Plain Python; never sees a tensor.

There is no prefill mode and no decode mode: a step advances computed tokens toward known tokens. Requests
that wait for their next token come first, with draft tokens; then prompts, as far as budget and time go.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence

from engine.batch import Batch, BatchLimits, PassResult, ScheduledRequest, make_block_table
from engine.messages import Failure, RequestOutput, SamplingParams
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.grants import DraftGrants
from engine.scheduling.pacing import Pacing, Unpaced
from engine.scheduling.prompts import PromptShare, is_being_read, read_prompts, reusable_hashes
from engine.scheduling.request import Request
from engine.speculation.facts import step_cost
from engine.speculation.policy import SpeculationPolicy

_STEPS_WHEN_SHORT = 100  # until a pass is tried again that memory was short for: one in a hundred is lost


class Scheduler:
    """Continuous batching with chunked prefill, prefix reuse and preemption by recompute.

    The pool must hold at least one request of `max_model_len`, so that the oldest can always go on. `pacing`:
    how much of prompts a step reads, by default all there is room for. `ngrams`: look up what followed a
    request's last tokens before, for drafters that make use of it.
    """

    def __init__(
        self,
        limits: BatchLimits,
        pool: BlockPool,
        policy: SpeculationPolicy,
        eos_token_ids: Sequence[int],
        seed: int = 0,
        *,
        pacing: Pacing | None = None,
        ngrams: bool = False,
    ) -> None:
        self.limits = limits
        self.pool = pool
        self._pacing: Pacing = pacing or Unpaced()
        self._eos_token_ids = frozenset(eos_token_ids)
        self._seed = seed
        self._ngrams = ngrams
        self._num_arrived = 0
        self._requests: dict[str, Request] = {}
        self._waiting: list[Request] = []  # oldest first
        self._running: list[Request] = []  # oldest first
        self._seats = list(range(limits.max_num_seqs - 1, -1, -1))
        self._num_short = 0  # steps to go without admitting anybody, because passes had no memory
        self._drafts = DraftGrants(self._requests, pool, policy, limits, ngrams)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def kv_usage(self) -> float:
        """Share of the blocks that requests hold, 0 to 1."""
        return self.pool.num_held / self.pool.num_blocks

    def has_work(self) -> bool:
        return bool(self._requests)

    def add(
        self, request_id: str, prompt_token_ids: list[int], sampling: SamplingParams, cache_scope: str = ""
    ) -> None:
        """Queue a request. The caller has validated it against the model."""
        # An unseeded request still gets a seed of its own: a preempted one must draw the same tokens again.
        seed = sampling.seed if sampling.seed is not None else hash((self._seed, self._num_arrived))
        request = Request(
            request_id=request_id,
            arrival=self._num_arrived,
            token_ids=list(prompt_token_ids),
            num_prompt_tokens=len(prompt_token_ids),
            sampling=sampling,
            seed=seed,
            cache_scope=cache_scope,
        )
        self._num_arrived += 1
        self._requests[request_id] = request
        self._waiting.append(request)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._requests

    def abort(self, request_id: str) -> None:
        """Forget a request wherever it is; unknown ones are ignored, they may just have finished."""
        request = self._requests.get(request_id)
        if request is not None:
            request.finish_reason = "abort"
            self._remove(request)

    def fail(self, request_id: str, failure: Failure) -> RequestOutput:
        """Forget a request that cannot be computed; its last output."""
        request = self._requests[request_id]
        self.abort(request_id)
        return RequestOutput(
            request_id=request_id, token_ids=[], usage=request.usage(), finish_reason="abort", failure=failure
        )

    def put_back_last(self, batch: Batch) -> str:
        """Let the request of a batch that came last wait, because the device has no memory for a pass with
        it; its id. It and all others that wait are admitted once one of those that run has ended, or memory
        may have come back."""
        last = max((self._requests[s.request.request_id] for s in batch.scheduled), key=lambda r: r.arrival)
        batch.scheduled = [s for s in batch.scheduled if s.request is not last]
        self._preempt(last)
        self._num_short = _STEPS_WHEN_SHORT
        return last.request_id

    # --- schedule

    def schedule(self) -> Batch:
        batch = Batch()
        self._num_short = max(self._num_short - 1, 0) if self._running else 0
        self._schedule_decoding(batch)
        budget = self.limits.max_num_batched_tokens - batch.num_tokens
        room = self.pool.num_available * self.pool.block_size
        prompts = self._prompts(joining=bool(self._waiting) and self._waiting[0].num_pending <= room)
        if prompts or self._waiting:
            share = PromptShare(
                self._pacing, budget, [scheduled.num_computed for scheduled in batch.scheduled]
            )
            num_prompt_tokens = share.likely_tokens(prompts)
            self._drafts.plan(batch, share.most_drafts(num_prompt_tokens), num_prompt_tokens)
            share.pay_drafts(sum(scheduled.num_drafts for scheduled in batch.scheduled))
            self._read_prompts(batch, share)
        else:
            self._drafts.plan(batch, budget)
        self._drafts.settle()
        return batch

    def plan_ahead(self, batch: Batch) -> Batch | None:
        """The batch after one whose result is not known yet, None where it depends on that: who takes part,
        and how large trees are, does not where all decode. Blocks are taken for the longest outcome.

        It counts once it is confirmed, and until then nobody else is scheduled.
        """
        if self._is_due(batch):
            return None
        ahead = Batch()
        for scheduled in batch.scheduled:
            request, most_gained = self._requests[scheduled.request.request_id], scheduled.num_drafts + 1
            goes_on = scheduled.commits and request.has_hidden and request.num_remaining > 1
            longest = len(request.token_ids) + most_gained
            if not (
                goes_on
                and longest <= self.limits.max_model_len
                and self.pool.extend(request.block_table, longest)
            ):
                return None
            ahead.scheduled.append(ScheduledRequest(request, 1, most_gained=most_gained))
        self._drafts.plan(ahead, self.limits.max_num_batched_tokens - len(ahead.scheduled))
        return ahead

    def confirm(self, ahead: Batch) -> bool:
        """Whether a batch that was planned ahead is the next, now that the one before has been taken in. If
        not, nothing has come of it but blocks that are held for longer, and `schedule` goes its way."""
        if self._is_due(ahead) or any(s.request.num_pending != 1 for s in ahead.scheduled):
            return False
        for scheduled in ahead.scheduled:
            scheduled.num_computed, scheduled.most_gained = scheduled.request.num_computed, 0
        if not self._drafts.join_chains(ahead):
            return False
        self._drafts.settle()
        return True

    def _is_due(self, batch: Batch) -> bool:
        """Whether others than these requests are to be scheduled."""
        may_join = bool(self._waiting and self._seats) or self._num_short > 0
        return may_join or [s.request for s in batch.scheduled] != self._running

    def _schedule_decoding(self, batch: Batch) -> None:
        """Roots of all that wait for their next token, preempting the youngest where blocks run out."""
        position = 0
        while position < len(self._running) and len(batch.scheduled) < self.limits.max_num_batched_tokens:
            request = self._running[position]
            position += 1
            if not request.has_hidden:
                continue
            while not self.pool.extend(request.block_table, len(request.token_ids)):
                if self._reclaim(batch):
                    continue
                self._preempt(self._running[-1])
                batch.num_preemptions += 1
                if request.seat is None:  # it was the youngest itself
                    return
            batch.scheduled.append(ScheduledRequest(request, 1))

    def _prompts(self, joining: bool) -> list[Request]:
        """Those that are read, and of those that wait as many as there are places for; oldest first."""
        prompts = [request for request in self._running if not request.has_hidden]
        prompts += self._waiting[: len(self._seats)] if joining else []
        return sorted(prompts, key=lambda request: request.arrival)

    def _read_prompts(self, batch: Batch, share: PromptShare) -> None:
        """Go on with prompts. No waiting one overtakes another that blocks are short for."""
        blocked = batch.num_preemptions > 0 or self._num_short > 0

        def joins(request: Request) -> bool:
            nonlocal blocked
            if request.seat is not None:
                return True
            if blocked or is_being_read(request, self._running, self.pool):
                return False
            blocked = not self._admit(request, batch)
            return not blocked

        batch.scheduled += read_prompts(self._prompts(joining=not blocked), share, self.pool, joins)

    def _admit(self, request: Request, batch: Batch) -> bool:
        """Let a waiting request run, where blocks are there for all its known tokens, not only for a first
        chunk: half a prompt helps nobody."""
        prefix = self.pool.find_prefix(reusable_hashes(request, self.pool))
        self.pool.share(prefix)
        table = make_block_table(prefix)
        num_tokens = len(request.token_ids)
        if not self.pool.extend(table, num_tokens) and not (
            self._reclaim(batch) and self.pool.extend(table, num_tokens)
        ):
            self.pool.release(prefix)
            return False
        self._waiting.remove(request)
        insort(self._running, request, key=lambda r: r.arrival)
        request.block_table = table
        request.seat = self._seats.pop()
        request.num_registered = len(prefix)
        request.num_computed = len(prefix) * self.pool.block_size
        if request.cached_tokens is None:  # a preempted one that finds its own blocks again has no hit
            request.cached_tokens = request.num_computed
            batch.prefix_queries += request.num_prompt_tokens
            batch.prefix_hits += request.num_computed
        return True

    def _reclaim(self, batch: Batch) -> bool:
        """Take back the blocks that drafts left empty, or would fill in this batch; whether there were any.
        They are not given back at once, so that a request's blocks stay next to each other."""
        found = False
        for request in self._running:
            needed = -(-len(request.token_ids) // self.pool.block_size)
            surplus = request.block_table[needed:]
            if surplus:
                self.pool.release(surplus)
                del request.block_table[needed:]
                found = True
        for scheduled in batch.scheduled:
            state = scheduled.request
            scheduled.grant(len(state.block_table) * self.pool.block_size - len(state.token_ids))
        return found

    def _preempt(self, request: Request) -> None:
        self._release(request)
        request.num_computed = 0
        request.has_hidden = False
        insort(self._waiting, request, key=lambda r: r.arrival)

    def _release(self, request: Request) -> None:
        """Give back what a running request holds on the device."""
        self._running.remove(request)
        self.pool.release(request.block_table)
        request.block_table = make_block_table()
        if request.seat is not None:
            self._seats.append(request.seat)
            request.seat = None

    def _remove(self, request: Request) -> None:
        del self._requests[request.request_id]
        self._num_short = 0
        if request.seat is not None:
            self._release(request)
        else:
            self._waiting.remove(request)

    # --- update

    def update(self, batch: Batch, results: Sequence[PassResult]) -> list[RequestOutput]:
        """Take in a pass: `results[i]` belongs to `batch.scheduled[i]`."""
        outputs = []
        for scheduled, result in zip(batch.scheduled, results, strict=True):
            request = self._requests.get(scheduled.request.request_id)
            if request is None:  # aborted while the pass ran
                continue
            if scheduled.commits:
                outputs.append(self._commit(request, scheduled, result))
            else:
                request.num_computed += scheduled.num_tokens
                if self._ngrams:  # chunk by chunk, so that no step waits for a long prompt to be indexed
                    request.ngrams.extend(request.token_ids[: request.num_computed])
            self._register_blocks(request)
            if request.finish_reason is not None:
                self._remove(request)
        return outputs

    def _commit(self, request: Request, scheduled: ScheduledRequest, result: PassResult) -> RequestOutput:
        root = len(request.token_ids) - 1
        appended: list[int] = []
        for token_id in result.token_ids:
            appended.append(token_id)
            if request.append(token_id, self._eos_token_ids, self.limits.max_model_len):
                break
        num_accepted = min(len(result.token_ids) - 1, len(appended))
        # Of root and accepted tokens the KV is final; the bonus token is the next root.
        request.num_computed = root + 1 + num_accepted
        request.has_hidden = True
        scheduled.num_committed, scheduled.num_accepted = len(appended), num_accepted
        scheduled.draft_depth = result.draft_depth
        request.decode_steps += 1
        request.drafted_tokens += scheduled.num_drafts
        request.accepted_tokens += num_accepted
        self._drafts.observe(scheduled, appended)
        return RequestOutput(
            request_id=request.request_id,
            token_ids=appended,
            usage=request.usage(),
            logprobs=None if result.logprobs is None else result.logprobs[: len(appended)],
            finish_reason=request.finish_reason,
            stop_token_id=request.stop_token_id,
        )

    def learn(self, batch: Batch, seconds: float) -> None:
        """Take in how long a batch took that nothing disturbed."""
        self._pacing.observe(batch, seconds)
        if all(scheduled.num_tokens == 1 for scheduled in batch.scheduled):
            self._drafts.observe_step(step_cost(batch, seconds))

    def _register_blocks(self, request: Request) -> None:
        num_full = request.num_computed // self.pool.block_size
        if num_full > request.num_registered:
            request.extend_hashes(self.pool.block_size)
            for block in range(request.num_registered, num_full):
                self.pool.register(request.block_table[block], request.block_hashes[block])
            request.num_registered = num_full

    def check_integrity(self) -> None:
        """Raises IntegrityError where pool, tables and slots disagree. For tests and fault finding."""
        self.pool.check_integrity(request.block_table for request in self._running)
