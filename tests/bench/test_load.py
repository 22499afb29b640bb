"""Loads keep their level or their rate, and read tokens, steps and errors from what servers stream."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from bench.load import Load, closed_loop, open_loop, summarize_load
from bench.prompts import Prompt
from bench.report import percentiles
from bench.stream import Answer, Ask, BenchError
from tests.bench.servers import FakeServer, sse, text, usage

PROMPTS = [Prompt(str(i), "all", f"question {i}") for i in range(6)]
ASK = Ask(model="model", max_tokens=9)


async def measure(server: FakeServer, concurrency: int, time_limit: float | None = None) -> dict[str, Any]:
    async with server.client() as client:
        return summarize_load(await closed_loop(client, ASK, PROMPTS, concurrency, time_limit))


async def test_a_level_counts_tokens_and_steps() -> None:
    server = FakeServer(sse(text(""), text("a b"), text("c"), usage(8, decode_steps=4, prompt_tokens=5)))
    level = await measure(server, concurrency=3)
    assert (level["requests"], level["tokens"], level["tokens_per_step"]) == (6, 48, 2.0)
    assert (level["prompt_tokens"], level["timed_out"], level["refused"]) == (30, False, 0)
    assert server.most_waiting == 3
    assert {r["messages"][0]["content"] for r in server.requests} == {p.text for p in PROMPTS}
    assert all(r["temperature"] == 0 and r["max_tokens"] == 9 for r in server.requests)
    assert not any("ignore_eos" in r for r in server.requests)


async def test_without_usage_chunks_are_counted() -> None:
    level = await measure(FakeServer(sse(text("a"), text("b"))), concurrency=1)
    assert (level["tokens"], level["tokens_per_step"]) == (12, None)


async def test_llamacpp_tells_accepted_drafts_in_its_timings() -> None:
    last = {**usage(8), "timings": {"draft_n": 9, "draft_n_accepted": 4}}
    level = await measure(FakeServer(sse(text("a"), last)), concurrency=1)
    assert level["tokens_per_step"] == 2.0


async def test_vllm_tells_accepted_drafts_in_its_metrics() -> None:
    class Counting(FakeServer):
        def answer(self, request: dict[str, Any]) -> httpx.Response:
            accepted = 6 * len(self.requests)
            self.metrics = f'vllm:spec_decode_num_accepted_tokens_total{{engine="0"}} {accepted}.0\n'
            return super().answer(request)

    server = Counting(
        sse(text("a"), usage(8)), metrics="vllm:spec_decode_num_accepted_tokens_total 0.0\nother 5\n"
    )
    level = await measure(server, concurrency=2)
    assert level["tokens_per_step"] == pytest.approx(8 / 2)


@pytest.mark.parametrize(
    "server",
    [
        FakeServer(json.dumps({"error": {"message": "too busy"}}), 429),
        FakeServer(sse({"error": {"message": "too busy"}})),
    ],
)
async def test_a_failed_request_ends_the_measurement(server: FakeServer) -> None:
    with pytest.raises(BenchError, match="too busy"):
        await measure(server, concurrency=2)


async def test_a_time_limit_cuts_answers_off() -> None:
    level = await measure(FakeServer(sse(text("a")), seconds=30), concurrency=2, time_limit=0.05)
    assert level["timed_out"]
    assert (level["requests"], level["tokens"], level["ttft_seconds"]) == (0, 0, None)
    assert 0.04 < level["seconds"] < 10


async def test_an_open_loop_sends_at_its_rate_and_not_when_answers_come() -> None:
    server = FakeServer(sse(text("a"), usage(1)), seconds=0.3)
    prompts = PROMPTS * 5
    async with server.client() as client:
        load = await open_loop(client, ASK, prompts, rate=300, seed=1)
    assert summarize_load(load)["requests"] == len(prompts)
    gaps = [b - a for a, b in zip(server.arrivals, server.arrivals[1:], strict=False)]
    assert server.most_waiting > 10
    assert len({round(gap, 4) for gap in gaps}) > 5  # at random, not at even distances


async def test_an_open_loop_counts_what_an_overloaded_server_refuses() -> None:
    async with FakeServer("busy", 503).client() as client:
        figures = summarize_load(await open_loop(client, ASK, PROMPTS, rate=1000, seed=0))
    assert (figures["refused"], figures["requests"], figures["tokens"]) == (6, 0, 0)
    async with FakeServer("broken", 500).client() as client:
        with pytest.raises(BenchError, match="500: broken"):
            await open_loop(client, ASK, PROMPTS, rate=1000, seed=0)


def test_time_per_token_leaves_the_first_out() -> None:
    answers = [
        Answer(first_token=1.0, seconds=3.0, tokens=5),
        Answer(first_token=2.0, seconds=2.0, tokens=1),
        Answer(first_token=0.5, tokens=7),  # cut off
    ]
    figures = summarize_load(Load(answers, seconds=4.0, timed_out=True, accepted=None))
    assert figures["seconds_per_token"] == {"mean": 0.5, "p50": 0.5, "p90": 0.5, "p99": 0.5}
    assert figures["ttft_seconds"]["p50"] == 1.0
    assert (figures["tokens"], figures["requests"], figures["tokens_per_second"]) == (13, 2, 3.25)


def test_percentiles() -> None:
    assert percentiles([]) is None
    assert percentiles([float(i) for i in range(101)]) == {
        "mean": 50.0,
        "p50": 50.0,
        "p90": 90.0,
        "p99": 99.0,
    }
