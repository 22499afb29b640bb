"""What the scheduling tests share, without torch: a scheduler at hand, and a runner that computes nothing but
keeps account of what every place of the KV cache would hold."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from engine.batch import Batch, BatchLimits, PassResult, ScheduledRequest
from engine.messages import RequestOutput, SamplingParams, SpeculationParams
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.pacing import Pacing
from engine.scheduling.request import Request
from engine.scheduling.scheduler import Scheduler
from engine.speculation.policy import FixedSpeculation, SpeculationPolicy

EOS = 2


def params(max_tokens: int = 8, **settings: Any) -> SamplingParams:
    """Greedy sampling parameters; `speculation` may be a plain dict."""
    if isinstance(settings.get("speculation"), dict):
        settings["speculation"] = SpeculationParams(**settings["speculation"])
    return SamplingParams(max_tokens=max_tokens, **{"temperature": 0.0, **settings})


def make_scheduler(
    *,
    num_blocks: int = 64,
    block_size: int = 4,
    max_num_seqs: int = 8,
    budget: int = 64,
    max_model_len: int = 64,
    max_drafts: int = 8,
    policy: SpeculationPolicy | None = None,
    eos: Sequence[int] = (EOS,),
    pacing: Pacing | None = None,
    ngrams: bool = False,
) -> Scheduler:
    limits = BatchLimits(max_num_seqs, budget, max_model_len, max_drafts)
    pool = BlockPool(num_blocks, block_size)
    return Scheduler(limits, pool, policy or FixedSpeculation(0), eos, pacing=pacing, ngrams=ngrams)


def next_token(known: Sequence[int]) -> int:
    """The fake model: a token from 3 to 49 that depends on everything before it."""
    state = 7
    for token in known:
        state = (state * 31 + token) % 1_000_003
    return 3 + state % 47


def continuation(
    prompt: Sequence[int], sampling: SamplingParams, max_model_len: int = 64, eos: Sequence[int] = (EOS,)
) -> list[int]:
    """What the fake model answers, one token at a time, with nothing clever in between."""
    known = list(prompt)
    output: list[int] = []
    while True:
        token = next_token(known)
        known.append(token)
        output.append(token)
        ends = token in sampling.stop_token_ids or (token in eos and not sampling.ignore_eos)
        if ends and len(output) > sampling.min_tokens:
            return output
        if len(output) == sampling.max_tokens or len(known) == max_model_len:
            return output


class FakeRunner:
    """Accepts as many drafts as `accept` says (of how many, for each request), and checks that every
    position a request counts as computed really holds what belongs there."""

    def __init__(self, scheduler: Scheduler, accept: Callable[[int], int] = lambda num_drafts: 0) -> None:
        self.scheduler = scheduler
        self._accept = accept
        self._slots: dict[int, tuple[int, ...]] = {}  # KV slot -> the tokens whose KV it is, from the start
        self._rows: dict[int | None, tuple[str, int]] = {}  # state row -> whose hidden row, after which token

    def execute(self, batch: Batch) -> list[PassResult]:
        limits = self.scheduler.limits
        assert batch.num_tokens <= limits.max_num_batched_tokens
        assert len(batch.scheduled) <= limits.max_num_seqs
        places = [s.request.seat for s in batch.scheduled]
        assert None not in places and len(set(places)) == len(places)
        return [self._advance(scheduled) for scheduled in batch.scheduled]

    def _advance(self, scheduled: ScheduledRequest) -> PassResult:
        request, drafts = scheduled.request, scheduled.num_drafts
        computed, known = request.num_computed, list(request.token_ids)
        assert 1 <= scheduled.num_tokens <= request.num_pending
        for position in range(computed):
            assert self._slots.get(self._slot(request, position)) == tuple(known[: position + 1])
        for position in range(computed, computed + scheduled.num_tokens):
            self._slots[self._slot(request, position)] = tuple(known[: position + 1])
        if not scheduled.commits:
            assert drafts == 0
            return PassResult([])
        assert drafts <= self._draft_limit(request)
        assert not drafts or self._rows[request.seat] == (request.request_id, len(known))
        base = len(known) - 1
        for node in range(1, drafts + 1):
            self._slots[self._slot(request, base + node)] = (-1,)
        committed = [next_token(known)]
        for _ in range(min(self._accept(drafts), drafts)):
            known.append(committed[-1])
            self._slots[self._slot(request, len(known) - 1)] = tuple(known)
            committed.append(next_token(known))
        self._rows[request.seat] = (request.request_id, len(known) + 1)
        return PassResult(committed)

    def _draft_limit(self, request: Request) -> int:
        speculation = request.sampling.speculation
        limit = self.scheduler.limits.max_drafts if speculation.enabled and request.has_hidden else 0
        most = speculation.max_draft_tokens
        return limit if most is None else min(limit, most)

    def _slot(self, request: Request, position: int) -> int:
        size = self.scheduler.pool.block_size
        return request.block_table[position // size] * size + position % size


def run_step(scheduler: Scheduler, runner: FakeRunner) -> tuple[Batch, list[RequestOutput]]:
    batch = scheduler.schedule()
    scheduler.check_integrity()
    outputs = scheduler.update(batch, runner.execute(batch))
    scheduler.check_integrity()
    return batch, outputs


def run_all(
    scheduler: Scheduler, runner: FakeRunner, max_steps: int = 2000
) -> tuple[dict[str, list[int]], list[Batch]]:
    """Step until nothing is left; every request's tokens, and the batches."""
    tokens: dict[str, list[int]] = {}
    batches = []
    for _ in range(max_steps):
        if not scheduler.has_work():
            break
        batch, outputs = run_step(scheduler, runner)
        batches.append(batch)
        for output in outputs:
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
    assert not scheduler.has_work(), f"still busy after {max_steps} steps"
    assert scheduler.pool.num_held == 0
    return tokens, batches


def random_accept(seed: int) -> Callable[[int], int]:
    source = random.Random(seed)
    return lambda num_drafts: source.randint(0, num_drafts)
