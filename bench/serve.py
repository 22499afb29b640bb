"""`gorgon bench serve`: load over HTTP against any OpenAI-compatible server, level after level."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import httpx

from bench.facts import machine_facts
from bench.load import closed_loop, open_loop, summarize_load
from bench.prompts import Prompt, read_prompts, sample
from bench.proxies import is_loopback
from bench.report import print_json, print_table
from bench.stream import Answer, Ask, BenchError, first_model, stream_answer
from bench.synthetic import synthetic_prompts

READ_TIMEOUT = 600.0  # seconds without a token: a long queue is not an error


@dataclass(frozen=True, kw_only=True)
class ServeBenchOptions:
    """`concurrency`: numbers of requests kept running, one level after the other. `rates`: requests per
    second that arrive at random; where there are any, they are the levels. `input_len` makes prompts up
    instead of reading `prompts`. `output_len` gives every answer that length instead of at most
    `max_tokens`."""

    url: str
    api_key: str | None
    model: str | None
    prompts: Path
    num_requests: int
    concurrency: tuple[int, ...]
    rates: tuple[float, ...]
    input_len: int | None
    output_len: int | None
    max_tokens: int
    seed: int


def run(options: ServeBenchOptions) -> int:
    document = asyncio.run(_measure(options))
    print_levels(document["levels"])
    print_json(document)
    return 0


def print_levels(levels: Sequence[dict[str, Any]]) -> None:
    """One line a level; times in milliseconds."""
    unit = "rate" if "rate" in levels[0] else "concurrency"
    headers = [unit, "tok/s", "req/s", *(f"ttft {p}" for p in ("p50", "p90", "p99"))]
    headers += [f"ms/tok {p}" for p in ("p50", "p90", "p99")]
    print_table(
        [*headers, "tok/step", "refused"],
        [
            [
                level[unit],
                level["tokens_per_second"],
                level["requests_per_second"],
                *_milliseconds(level["ttft_seconds"]),
                *_milliseconds(level["seconds_per_token"]),
                level["tokens_per_step"],
                level["refused"],
            ]
            for level in levels
        ],
    )


def _milliseconds(figures: dict[str, float] | None) -> list[float | None]:
    return [None if figures is None else 1000 * figures[p] for p in ("p50", "p90", "p99")]


def connect(url: str, api_key: str | None = None) -> httpx.AsyncClient:
    """A client for one server, without a limit on connections; to be used as a context manager.

    Connections are not kept, because a server may close an idle one just before it is used again.
    """
    return httpx.AsyncClient(
        base_url=url,
        headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
        timeout=httpx.Timeout(10.0, read=READ_TIMEOUT, pool=None),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
        trust_env=not is_loopback(url),
    )


async def _measure(options: ServeBenchOptions) -> dict[str, Any]:
    try:
        async with connect(options.url, options.api_key) as client:
            ask = Ask(
                model=options.model or await first_model(client),
                max_tokens=options.output_len or options.max_tokens,
                ignore_eos=options.output_len is not None,
            )
            levels = await _levels(client, ask, options)
    except httpx.HTTPError as error:
        raise BenchError(f"{options.url}: {str(error) or type(error).__name__}") from error
    return {
        "bench": "serve",
        **machine_facts(),
        "url": options.url,
        "model": ask.model,
        "prompts": f"synthetic:{options.input_len}" if options.input_len else options.prompts.name,
        "max_tokens": ask.max_tokens,
        "ignore_eos": ask.ignore_eos,
        "num_requests": options.num_requests,
        "levels": levels,
    }


async def _levels(client: httpx.AsyncClient, ask: Ask, options: ServeBenchOptions) -> list[dict[str, Any]]:
    prompts = await _prompts(client, ask, options)
    await stream_answer(client, replace(ask, max_tokens=min(8, ask.max_tokens)), prompts[0], Answer())
    levels: list[dict[str, Any]] = []
    for rate in options.rates:
        load = await open_loop(client, ask, prompts, rate, options.seed)
        levels.append({"rate": rate, **summarize_load(load)})
    for concurrency in () if options.rates else options.concurrency:
        load = await closed_loop(client, ask, prompts, concurrency)
        levels.append({"concurrency": concurrency, **summarize_load(load)})
    return levels


async def _prompts(client: httpx.AsyncClient, ask: Ask, options: ServeBenchOptions) -> list[Prompt]:
    if options.input_len is not None:
        return await synthetic_prompts(client, ask, options.input_len, options.num_requests, options.seed)
    prompts = read_prompts(options.prompts)
    prompts = sample(prompts, min(options.num_requests, len(prompts)), options.seed)
    return list(islice(cycle(prompts), options.num_requests))
