"""Measures, at start-up, how long a pass takes by its number of tokens: what speculation is planned with."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from engine.messages import SamplingParams
from engine.runner.runner import Runner
from engine.scheduling.batch import Batch, ScheduledRequest
from engine.scheduling.request import Request
from engine.scheduling.speculation import Acceptance, CostModel

_TOKENS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
_REQUESTS = (1, 4, 16, 64)
_CONTEXT = 128  # computed tokens of each request in a measured pass
_REPEATS = 3


def measure_costs(runner: Runner, max_num_seqs: int, max_num_tokens: int) -> CostModel:
    """Time passes of growing size and drafting for growing numbers of requests.

    Writes into the cache and the per-request state; run it before the first request.
    """
    drafter, runner.drafter = runner.drafter, None
    passes = []
    for count in (n for n in _TOKENS if n <= max_num_tokens):
        batch = _batch(runner, count, max_num_seqs)
        if batch is not None:
            passes.append((count, _seconds(lambda batch=batch: runner.execute(batch))))  # type: ignore[misc]
    runner.drafter = drafter
    drafting = [(1, 0.0)]
    if drafter is not None:
        counts = [n for n in _REQUESTS if n <= max_num_seqs]
        drafting = [(n, _seconds(lambda n=n: runner.draft_for(n))) for n in counts]  # type: ignore[misc]
    return CostModel(passes=tuple(passes), drafting=tuple(drafting))


def _batch(runner: Runner, num_tokens: int, max_num_seqs: int) -> Batch | None:
    """Decoding requests with even trees that make up `num_tokens`; None where the cache is too small."""
    widest = len(runner.family.depths)
    num_requests = min(max(1, -(-num_tokens // min(8, widest))), max_num_seqs)
    blocks_each = -(-(_CONTEXT + widest) // runner.cache.block_size)
    if num_requests * blocks_each > runner.cache.num_blocks or num_tokens > num_requests * widest:
        return None
    batch = Batch()
    for index in range(num_requests):
        request = Request(
            request_id=str(index),
            arrival=index,
            token_ids=[0] * (_CONTEXT + 1),
            num_prompt_tokens=_CONTEXT + 1,
            sampling=SamplingParams(max_tokens=widest, temperature=0.0),
            seed=0,
            acceptance=Acceptance(),
            num_computed=_CONTEXT,
            block_table=list(range(index * blocks_each, (index + 1) * blocks_each)),
            slot=index,
            has_hidden=True,
        )
        share = num_tokens // num_requests + (index < num_tokens % num_requests)
        batch.scheduled.append(ScheduledRequest(request, 1, share - 1))
    return batch


def _seconds(run: Callable[[], object]) -> float:
    """The fastest of a few runs: what the machine does when nothing else disturbs it."""
    run()
    times = []
    for _ in range(_REPEATS):
        _synchronize()
        start = time.perf_counter()
        run()
        _synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
