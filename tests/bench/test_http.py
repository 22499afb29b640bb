"""The HTTP benchmark keeps its level of concurrency and reads usage and errors from the stream."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from bench.http import BenchError, measure_level
from bench.prompts import Prompt

PROMPTS = [Prompt(str(i), "all", f"question {i}") for i in range(6)]


def sse(*events: dict[str, Any]) -> str:
    return "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"


def text(content: str) -> dict[str, Any]:
    return {"choices": [{"delta": {"content": content}}]}


class Server:
    """Answers after a moment, and counts how many requests wait at once."""

    def __init__(self, body: str, status: int = 200) -> None:
        self.body, self.status = body, status
        self.waiting = self.most_waiting = 0
        self.requests: list[dict[str, Any]] = []

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(json.loads(request.content))
        self.waiting += 1
        self.most_waiting = max(self.most_waiting, self.waiting)
        await asyncio.sleep(0.005)
        self.waiting -= 1
        return httpx.Response(self.status, text=self.body)

    async def measure(self, concurrency: int) -> dict[str, Any]:
        async with httpx.AsyncClient(transport=httpx.MockTransport(self), base_url="http://server") as client:
            return await measure_level(client, "model", PROMPTS, concurrency, max_tokens=9)


async def test_a_level_counts_tokens_and_steps() -> None:
    usage = {"choices": [], "usage": {"completion_tokens": 8, "decode_steps": 4}}
    server = Server(sse(text(""), text("a b"), text("c"), usage))
    level = await server.measure(concurrency=3)
    assert (level["requests"], level["tokens"], level["tokens_per_step"]) == (6, 48, 2.0)
    assert server.most_waiting == 3
    assert {r["messages"][0]["content"] for r in server.requests} == {p.text for p in PROMPTS}
    assert all(r["temperature"] == 0 and r["max_tokens"] == 9 for r in server.requests)


async def test_without_usage_chunks_are_counted() -> None:
    level = await Server(sse(text("a"), text("b"))).measure(concurrency=1)
    assert (level["tokens"], level["tokens_per_step"]) == (12, None)


@pytest.mark.parametrize(
    "server",
    [
        Server(json.dumps({"error": {"message": "too busy"}}), 429),
        Server(sse({"error": {"message": "too busy"}})),
    ],
)
async def test_a_failed_request_ends_the_measurement(server: Server) -> None:
    with pytest.raises(BenchError, match="too busy"):
        await server.measure(concurrency=2)
