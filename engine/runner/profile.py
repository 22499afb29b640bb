"""Measures, at start-up, how long a pass takes by its number of tokens: what speculation is planned with."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from engine.messages import SamplingParams
from engine.runner.runner import Runner
from engine.scheduling.batch import Batch, ScheduledRequest
from engine.scheduling.cost import CostModel, Curve
from engine.scheduling.drafting import Acceptance, Allowance
from engine.scheduling.request import Request
from engine.scheduling.scheduler import SchedulerLimits

_TOKENS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
_REQUESTS = (1, 4, 16, 64)
_CONTEXT = 128  # computed tokens of each request in a measured pass, where the cache has room for them
_LONG_CONTEXT, _KEY_REQUESTS = 1024, 4  # where the price of longer contexts is measured
_DRAFTS = 8  # of each request when drafting is timed: more guesses take little longer
_REPEATS = 3
_TIME_LIMIT = 4.0  # seconds for either curve: on a slow or busy machine the largest sizes are extrapolated


def measure_costs(runner: Runner, limits: SchedulerLimits) -> CostModel:
    """Time passes of growing size and drafting for growing numbers of requests.

    Writes into the cache and the per-request state; run it before the first request.
    """
    drafter, runner.drafter = runner.drafter, None
    batches = {n: _batch(runner, limits, n) for n in _TOKENS if n <= limits.max_num_batched_tokens}
    passes = _curve({n: partial(runner.execute, batch) for n, batch in batches.items() if batch is not None})
    first_key, next_key = _key_seconds(runner, limits)
    runner.drafter = drafter
    cost = CostModel(passes, context=_CONTEXT, first_key=first_key, next_key=next_key)
    if drafter is None or not drafter.num_levels:
        return cost
    most = min(limits.max_num_seqs, runner.cache.num_blocks)
    sizes = [n for n in _REQUESTS if n <= most]
    first, rest = (
        _curve({n: partial(runner.draft, _guessing(runner, limits, n, drafts)) for n in sizes})
        for drafts in (1, max(_DRAFTS, drafter.num_levels))
    )
    return replace(cost, first_level=first, all_levels=rest, levels=drafter.num_levels)


def _key_seconds(runner: Runner, limits: SchedulerLimits) -> tuple[float, float]:
    """What one more computed position costs a request's root, and each further token of it in the pass."""
    num_requests, drafts = min(_KEY_REQUESTS, limits.max_num_seqs), min(_DRAFTS, limits.max_drafts)
    longest = min(_LONG_CONTEXT, room(runner, num_requests) - drafts - 1)
    more = longest - _CONTEXT
    if more <= 0 or not drafts:
        return 0.0, 0.0
    seconds = [
        _seconds(partial(runner.execute, decoding_batch(runner, [num_nodes] * num_requests, context)))
        for num_nodes in (1, drafts + 1)
        for context in (_CONTEXT, longest)
    ]
    roots = max(seconds[1] - seconds[0], 0.0)
    nodes = max(seconds[3] - seconds[2] - roots, 0.0)
    return roots / (num_requests * more), nodes / (num_requests * drafts * more)


def _curve(runs: dict[int, Callable[[], object]]) -> Curve:
    """Seconds of each run, in rising order of size for as long as the time limit allows; at least two."""
    points: list[tuple[int, float]] = []
    deadline = time.perf_counter() + _TIME_LIMIT
    for size, run in runs.items():
        points.append((size, _seconds(run)))
        if time.perf_counter() > deadline and len(points) > 1:
            break
    return tuple(points)


def _batch(runner: Runner, limits: SchedulerLimits, num_tokens: int) -> Batch | None:
    """Decoding requests with even trees that make up `num_tokens`; None where the cache is too small."""
    widest = limits.max_drafts + 1
    num_requests = min(max(1, -(-num_tokens // min(8, widest))), limits.max_num_seqs)
    if num_tokens > num_requests * widest or -(-num_tokens // num_requests) > room(runner, num_requests):
        return None
    shares = [num_tokens // num_requests + (i < num_tokens % num_requests) for i in range(num_requests)]
    return decoding_batch(runner, shares)


def _guessing(runner: Runner, limits: SchedulerLimits, num_requests: int, num_drafts: int) -> Batch:
    """Requests that ask the heads for as many draft tokens, as far as they have room for them."""
    num_nodes = min(num_drafts, limits.max_drafts) + 1
    return decoding_batch(runner, [min(num_nodes, room(runner, num_requests))] * num_requests)


def room(runner: Runner, num_requests: int) -> int:
    """Positions that each of these requests can have."""
    blocks_each = runner.cache.num_blocks // num_requests
    return min(blocks_each * runner.cache.block_size, runner.decoder.config.max_positions)


def decoding_batch(runner: Runner, trees: list[int], context: int = _CONTEXT) -> Batch:
    """Requests that decode with trees of these sizes, root included, each with blocks of its own."""
    widest = max(trees)
    context = min(context, room(runner, len(trees)) - widest)
    blocks_each = -(-(context + widest) // runner.cache.block_size)
    batch = Batch()
    for index, num_nodes in enumerate(trees):
        request = Request(
            request_id=str(index),
            arrival=index,
            token_ids=[0] * (context + 1),
            num_prompt_tokens=context + 1,
            sampling=SamplingParams(max_tokens=widest, temperature=0.0),
            seed=0,
            acceptance=Acceptance(),
            num_computed=context,
            block_table=list(range(index * blocks_each, (index + 1) * blocks_each)),
            slot=index,
            has_hidden=True,
        )
        drafts = num_nodes - 1
        batch.scheduled.append(ScheduledRequest(request, 1, drafts, allowance=Allowance(drafts)))
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
