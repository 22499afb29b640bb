"""Measures, at start-up, how long a pass takes by its number of tokens: what speculation is planned with."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch

from engine.batch import Allowance, Batch, BatchLimits, RequestState, ScheduledRequest, make_block_table
from engine.costs import CostModel, Curve
from engine.messages import SamplingParams
from engine.runner.drafter import BlankDrafter
from engine.runner.kept_timings import KeptTimings
from engine.runner.runner import Runner

_TOKENS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
_REQUESTS = (1, 4, 16, 64)
POSITIONS_TIMED = 1 << 14  # of a cache: a larger one makes no difference
_CONTEXT = 128  # computed tokens of each request in a measured pass, where the cache has room for them
_LONG_CONTEXT, _KEY_REQUESTS = 1024, 4  # where the price of longer contexts is measured
_DRAFTS = 8  # of each request when drafting is timed: more guesses take little longer
_REPEATS = 3
_WORTH_KEEPING = 0.1  # seconds of one run of each: what takes less is measured anew
_CHECKED = (1, 8)  # sizes that every start times, whatever is known
_CLEARLY_FASTER = 0.8  # of the time that is known
_TIME_LIMIT = 4.0  # seconds for either curve: on a slow or busy machine the largest sizes are extrapolated


def measure_costs(runner: Runner, limits: BatchLimits, kept: KeptTimings | None = None) -> CostModel:
    """Time passes of growing size and drafting for growing numbers of requests.

    Writes into the cache and the per-request state; run it before the first request. kept: what earlier
    starts have measured of the same, and where what this one finds goes.
    """
    known = {} if kept is None else kept.load()
    drafter, runner.drafter = runner.drafter, BlankDrafter()
    batches = {n: _batch(runner, limits, n) for n in _TOKENS if n <= limits.max_num_batched_tokens}
    runs = {n: partial(runner.execute, batch) for n, batch in batches.items() if batch is not None}
    timings = {"passes": _measure(runs, known.get("passes", {}))}
    contexts = _Contexts(runner, limits)
    timings["contexts"] = _measure(contexts.runs(), known.get("contexts", {}), math.inf)
    runner.drafter = drafter
    first_key, next_key = contexts.key_seconds(timings["contexts"])
    cost = CostModel(_curve(timings["passes"]), context=_CONTEXT, first_key=first_key, next_key=next_key)
    if drafter.num_levels:
        most = min(limits.max_num_seqs, runner.cache.num_blocks)
        for name, drafts in (("first_level", 1), ("all_levels", max(_DRAFTS, drafter.num_levels))):
            asked = {n: _guessing(runner, limits, n, drafts) for n in _REQUESTS if n <= most}
            guesses = {n: partial(runner.draft, batch) for n, batch in asked.items()}
            timings[name] = _measure(guesses, known.get(name, {}))
        first, rest = _curve(timings["first_level"]), _curve(timings["all_levels"])
        cost = replace(cost, first_level=first, all_levels=rest, levels=drafter.num_levels)
    total = sum(sum(curve.values()) for curve in timings.values())
    if kept is not None and timings != known and total > _WORTH_KEEPING:
        kept.save(timings)
    return cost


class _Contexts:
    """Passes that tell what contexts cost: roots alone and with drafts, over few positions and many."""

    def __init__(self, runner: Runner, limits: BatchLimits) -> None:
        self._runner = runner
        self._requests = min(_KEY_REQUESTS, limits.max_num_seqs)
        self._drafts = min(_DRAFTS, limits.max_drafts)
        self._longest = min(_LONG_CONTEXT, room(runner, self._requests) - self._drafts - 1)

    def runs(self) -> dict[int, Callable[[], object]]:
        """Numbered from 1; none where the cache is too small."""
        if self._longest <= _CONTEXT:
            return {}
        batches = [
            decoding_batch(self._runner, [num_nodes] * self._requests, context)
            for num_nodes in ((1, self._drafts + 1) if self._drafts else (1,))
            for context in (_CONTEXT, self._longest)
        ]
        return {number: partial(self._runner.execute, batch) for number, batch in enumerate(batches, 1)}

    def key_seconds(self, seconds: Mapping[int, float]) -> tuple[float, float]:
        """What one more computed position costs a request's root, and each further token of it."""
        if not seconds:
            return 0.0, 0.0
        more = self._requests * (self._longest - _CONTEXT)
        roots = max(seconds[2] - seconds[1], 0.0)
        if not self._drafts:
            return roots / more, 0.0
        nodes = max(seconds[4] - seconds[3] - roots, 0.0)
        return roots / more, nodes / (self._drafts * more)


def _measure(
    runs: Mapping[int, Callable[[], object]], known: Mapping[int, float], limit: float = _TIME_LIMIT
) -> dict[int, float]:
    """Seconds of each run by size, in rising order for as long as the limit allows; at least two.

    What is known is not measured again but for a look at a size or two. Where that is clearly faster now,
    the machine was busy then, and all is measured again. The lesser of both stays: it can only get better.
    """
    seconds = {size: known[size] for size in runs if size in known}
    found = {size: _seconds(runs[size], repeats=1) for size in _CHECKED if size in seconds}
    was_busy = any(now < _CLEARLY_FASTER * seconds[size] for size, now in found.items())
    deadline = time.perf_counter() + limit
    for size, run in runs.items():
        if was_busy or size not in seconds:
            found[size] = _seconds(run)
            if time.perf_counter() > deadline and len(seconds | found) > 1:
                break
    both = found.keys() | seconds.keys()
    return {size: min(found.get(size, math.inf), seconds.get(size, math.inf)) for size in sorted(both)}


def _curve(seconds: Mapping[int, float]) -> Curve:
    return tuple(seconds.items())


def _batch(runner: Runner, limits: BatchLimits, num_tokens: int) -> Batch | None:
    """Decoding requests with even trees that make up `num_tokens`; None where the cache is too small."""
    widest = limits.max_drafts + 1
    num_requests = min(max(1, -(-num_tokens // min(8, widest))), limits.max_num_seqs)
    if num_tokens > num_requests * widest or -(-num_tokens // num_requests) > room(runner, num_requests):
        return None
    shares = [num_tokens // num_requests + (i < num_tokens % num_requests) for i in range(num_requests)]
    return decoding_batch(runner, shares)


def _guessing(runner: Runner, limits: BatchLimits, num_requests: int, num_drafts: int) -> Batch:
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
        request = RequestState(
            request_id=str(index),
            token_ids=[0] * (context + 1),
            num_prompt_tokens=context + 1,
            sampling=SamplingParams(max_tokens=widest, temperature=0.0),
            seed=0,
            num_computed=context,
            block_table=make_block_table(range(index * blocks_each, (index + 1) * blocks_each)),
            seat=index,
        )
        drafts = num_nodes - 1
        batch.scheduled.append(ScheduledRequest(request, 1, drafts, allowance=Allowance(drafts)))
    return batch


def _seconds(run: Callable[[], object], repeats: int = _REPEATS) -> float:
    """The fastest of a few runs: what the machine does when nothing else disturbs it."""
    run()
    times = []
    for _ in range(repeats):
        _synchronize()
        start = time.perf_counter()
        run()
        _synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
