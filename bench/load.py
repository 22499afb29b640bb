"""Loads over HTTP and their figures: closed loop (a number of requests kept running) and open loop (requests
come at random times at a given rate, whether or not the earlier ones are done)."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from bench.prompts import Prompt
from bench.report import percentiles
from bench.stream import Answer, Ask, stream_answer


@dataclass(frozen=True)
class Load:
    """What came of one load. `timed_out`: a time limit ended it, and some answers were cut short.

    `accepted` is the number of draft tokens that the server's metrics say were accepted meanwhile, None where
    they do not tell.
    """

    answers: Sequence[Answer]
    seconds: float
    timed_out: bool
    accepted: int | None


async def closed_loop(
    client: httpx.AsyncClient,
    ask: Ask,
    prompts: Sequence[Prompt],
    concurrency: int,
    time_limit: float | None = None,
) -> Load:
    """Keep `concurrency` requests running until every prompt has been answered, or for `time_limit` seconds.

    Raises BenchError if a request is refused.
    """
    answers: list[Answer] = []

    async def worker(source: Iterator[Prompt]) -> None:
        for prompt in source:
            answers.append(Answer())
            await stream_answer(client, ask, prompt, answers[-1])

    remaining = iter(prompts)
    return await _measure(client, [worker(remaining) for _ in range(concurrency)], answers, time_limit)


async def open_loop(
    client: httpx.AsyncClient,
    ask: Ask,
    prompts: Sequence[Prompt],
    rate: float,
    seed: int,
    time_limit: float | None = None,
) -> Load:
    """Send every prompt once, at the times of a Poisson process of `rate` requests per second.

    A request that the server is too busy for is counted as refused. Raises BenchError for other refusals.
    """
    generator = random.Random(seed)
    answers = [Answer() for _ in prompts]

    async def arrive(at: float, prompt: Prompt, answer: Answer) -> None:
        await asyncio.sleep(at)
        await stream_answer(client, ask, prompt, answer, count_refusals=True)

    jobs, at = [], 0.0
    for prompt, answer in zip(prompts, answers, strict=True):
        jobs.append(arrive(at, prompt, answer))
        at += generator.expovariate(rate)
    return await _measure(client, jobs, answers, time_limit)


async def _measure(
    client: httpx.AsyncClient,
    jobs: Sequence[Coroutine[Any, Any, None]],
    answers: Sequence[Answer],
    time_limit: float | None,
) -> Load:
    before = await accepted_drafts(client)
    start = time.perf_counter()
    timed_out = await _run(jobs, time_limit)
    seconds = time.perf_counter() - start
    after = await accepted_drafts(client)
    accepted = None if before is None or after is None else after - before
    return Load(answers, seconds, timed_out, accepted)


async def _run(jobs: Sequence[Coroutine[Any, Any, None]], time_limit: float | None) -> bool:
    """Run all jobs; whether the time limit ended them. The first error ends the others and is raised."""
    tasks = [asyncio.create_task(job) for job in jobs]
    try:
        done, pending = await asyncio.wait(tasks, timeout=time_limit, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()
        return bool(pending)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def accepted_drafts(client: httpx.AsyncClient) -> int | None:
    """Draft tokens accepted since the server started, as vLLM's /metrics tells; None where they do not."""
    response = await client.get("/metrics")
    if response.is_error:
        return None
    values = [
        float(line.rsplit(maxsplit=1)[1])
        for line in response.text.splitlines()
        if line.startswith("vllm:spec_decode_num_accepted_tokens_total")
    ]
    return int(sum(values)) if values else None


def summarize_load(load: Load) -> dict[str, Any]:
    """The figures of one load; times in seconds. Answers that were cut short count in the throughput only."""
    done = [answer for answer in load.answers if answer.seconds is not None and not answer.refused]
    tokens = sum(answer.tokens for answer in load.answers)
    first = [answer.first_token for answer in load.answers if answer.first_token is not None]
    prompts = [answer.prompt_tokens for answer in done if answer.prompt_tokens is not None]
    return {
        "requests": len(done),
        "refused": sum(answer.refused for answer in load.answers),
        "timed_out": load.timed_out,
        "seconds": round(load.seconds, 3),
        "tokens": tokens,
        "prompt_tokens": sum(prompts) if prompts else None,
        "tokens_per_second": round(tokens / load.seconds, 2),
        "requests_per_second": round(len(done) / load.seconds, 3),
        "ttft_seconds": percentiles(first),
        "seconds_per_token": percentiles([a.per_token for a in done if a.per_token is not None]),
        "request_seconds": percentiles([a.seconds for a in done if a.seconds is not None]),
        "tokens_per_step": _tokens_per_step(load, done),
    }


def _tokens_per_step(load: Load, done: Sequence[Answer]) -> float | None:
    told = [answer for answer in done if answer.steps is not None]
    if told:
        tokens, steps = sum(a.tokens for a in told), sum(a.steps or 0 for a in told)
    elif load.accepted is not None:
        tokens = sum(answer.tokens for answer in load.answers)
        steps = tokens - load.accepted
    else:
        return None
    return round(tokens / steps, 3) if steps > 0 else None
