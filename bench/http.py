"""`gorgon bench serve`: closed-loop load over HTTP against any OpenAI-compatible server."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import httpx

from bench.facts import machine_facts
from bench.prompts import Prompt, read_prompts, sample
from bench.report import print_json, print_table, quartiles
from engine.errors import GorgonError


class BenchError(GorgonError):
    """The server cannot be reached, or refuses a request; nothing was measured."""


@dataclass(frozen=True, kw_only=True)
class ServeBenchOptions:
    """`concurrency`: numbers of requests kept running, one level after the other."""

    url: str
    api_key: str | None
    model: str | None
    prompts: Path
    num_requests: int
    concurrency: tuple[int, ...]
    max_tokens: int
    seed: int


@dataclass(frozen=True)
class Timing:
    """One request, in seconds. `steps` is None where the server does not report decode_steps."""

    first_token: float
    total: float
    tokens: int
    steps: int | None

    @property
    def per_token(self) -> float | None:
        return (self.total - self.first_token) / (self.tokens - 1) if self.tokens > 1 else None


def run(options: ServeBenchOptions) -> int:
    document = asyncio.run(_measure(options))
    print_table(
        ["concurrency", "tok/s", "ttft p50 ms", "ttft p75 ms", "per token p50 ms", "tok/step"],
        [
            [
                level["concurrency"],
                level["tokens_per_second"],
                1000 * level["ttft_seconds"]["median"],
                1000 * level["ttft_seconds"]["q3"],
                1000 * level["seconds_per_token"]["median"] if level["seconds_per_token"] else None,
                level["tokens_per_step"],
            ]
            for level in document["levels"]
        ],
    )
    print_json(document)
    return 0


async def _measure(options: ServeBenchOptions) -> dict[str, Any]:
    prompts = read_prompts(options.prompts)
    prompts = sample(prompts, min(options.num_requests, len(prompts)), options.seed)
    headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
    limits = httpx.Limits(max_connections=None)
    try:
        async with httpx.AsyncClient(
            base_url=options.url, headers=headers, timeout=httpx.Timeout(10.0, read=600.0), limits=limits
        ) as client:
            model = options.model or await _first_model(client)
            await _request(client, model, prompts[0], min(8, options.max_tokens))  # warm-up
            levels = []
            for concurrency in options.concurrency:
                requests = [p for p, _ in zip(cycle(prompts), range(options.num_requests), strict=False)]
                levels.append(await measure_level(client, model, requests, concurrency, options.max_tokens))
    except httpx.HTTPError as error:
        raise BenchError(f"{options.url}: {error or type(error).__name__}") from error
    return {
        "bench": "serve",
        **machine_facts(),
        "url": options.url,
        "model": model,
        "max_tokens": options.max_tokens,
        "num_requests": options.num_requests,
        "levels": levels,
    }


async def measure_level(
    client: httpx.AsyncClient, model: str, prompts: Sequence[Prompt], concurrency: int, max_tokens: int
) -> dict[str, Any]:
    """Keep `concurrency` requests running until every prompt has been answered."""
    timings: list[Timing] = []
    remaining = iter(prompts)

    async def worker(source: Iterator[Prompt]) -> None:
        for prompt in source:
            timings.append(await _request(client, model, prompt, max_tokens))

    start = time.perf_counter()
    await asyncio.gather(*(worker(remaining) for _ in range(concurrency)))
    seconds = time.perf_counter() - start
    per_token = [timing.per_token for timing in timings if timing.per_token is not None]
    steps = sum(timing.steps or 0 for timing in timings)
    tokens = sum(timing.tokens for timing in timings)
    return {
        "concurrency": concurrency,
        "requests": len(timings),
        "tokens": tokens,
        "tokens_per_second": round(tokens / seconds, 2),
        "ttft_seconds": quartiles([timing.first_token for timing in timings]),
        "seconds_per_token": quartiles(per_token) if per_token else None,
        "tokens_per_step": round(tokens / steps, 3) if steps else None,
    }


async def _request(client: httpx.AsyncClient, model: str, prompt: Prompt, max_tokens: int) -> Timing:
    """Stream one greedy answer. Raises BenchError if the server refuses it."""
    body = {
        "model": model,
        "messages": prompt.messages,
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    start = time.perf_counter()
    first: float | None = None
    chunks = 0
    usage: dict[str, Any] = {}
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.is_error:
            text = (await response.aread()).decode(errors="replace")
            raise BenchError(f"prompt {prompt.id}: the server answered {response.status_code}: {text[:300]}")
        async for line in response.aiter_lines():
            if not line.startswith("data:") or (data := line.removeprefix("data:").strip()) == "[DONE]":
                continue
            event = json.loads(data)
            if "error" in event:
                raise BenchError(f"prompt {prompt.id}: {event['error'].get('message')}")
            usage = event.get("usage") or usage
            if any(choice["delta"].get("content") for choice in event.get("choices", ())):
                chunks += 1
                first = first if first is not None else time.perf_counter() - start
    total = time.perf_counter() - start
    # Without usage, a chunk is the closest thing to a token that can be counted.
    tokens = usage.get("completion_tokens", chunks)
    return Timing(total if first is None else first, total, tokens, usage.get("decode_steps"))


async def _first_model(client: httpx.AsyncClient) -> str:
    response = await client.get("/v1/models")
    response.raise_for_status()
    return str(response.json()["data"][0]["id"])
