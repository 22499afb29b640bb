"""A stream begins before its first token is there, and shows that it lives while nothing comes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import httpx
import openai
import pytest

from engine.errors import EngineDeadError
from server import streaming
from tests.fake_engine import FakeEngine
from tests.server.support import (
    MODEL,
    ROUTES,
    app_for,
    body_for,
    client_for,
    events,
    eventually,
    live,
    streamed_text,
)

COMMENT = ": keep-alive"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "HEADERS_SECONDS", 0.02)
    monkeypatch.setattr(streaming, "COMMENT_SECONDS", 0.05)


@pytest.mark.parametrize("route", ROUTES)
async def test_headers_and_a_comment_come_before_the_first_token(route: str) -> None:
    engine = FakeEngine(step_seconds=30.0)
    async with live(app_for(engine)) as url, httpx.AsyncClient(base_url=url) as client:
        async with client.stream("POST", route, json=body_for(route, stream=True)) as response:
            assert response.status_code == 200
            lines = response.aiter_lines()
            seen = [await anext(lines) for _ in range(6)]
        assert seen == [COMMENT, ""] * 3
        await eventually(lambda: engine.aborted)


@pytest.mark.parametrize("route", ROUTES)
async def test_comments_fill_every_gap_and_change_no_event(route: str) -> None:
    slow = FakeEngine(answer="abc", tokens_per_step=1, step_seconds=0.12)
    async with client_for(app_for(slow)) as client:
        text = (await client.post(route, json=body_for(route, stream=True))).text
    async with client_for(app_for(FakeEngine(answer="abc", tokens_per_step=1))) as client:
        plain = (await client.post(route, json=body_for(route, stream=True))).text
    assert streamed_text(events(text)) == streamed_text(events(plain)) == "abc"
    assert len(events(text)) == len(events(plain))
    gaps = text.split("data: ")
    assert COMMENT in gaps[0] and sum(COMMENT in gap for gap in gaps) >= 3
    assert COMMENT not in plain


@pytest.mark.parametrize("route", ROUTES)
async def test_what_fails_after_the_headers_is_an_event(route: str) -> None:
    class DyingEngine(FakeEngine):
        async def generate(self, *request: object) -> AsyncIterator[None]:  # type: ignore[override]
            await asyncio.sleep(0.1)
            raise EngineDeadError("inside")
            yield

    async with client_for(app_for(DyingEngine())) as client:
        answer = await client.post(route, json=body_for(route, stream=True))
    assert answer.status_code == 200
    comment, *_, last = [line for line in answer.text.splitlines() if line]
    assert comment == COMMENT
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_dead"


async def test_the_official_client_reads_over_comments() -> None:
    engine = FakeEngine(answer="Hello", step_seconds=0.12)
    async with (
        live(app_for(engine)) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client,
    ):
        stream = await client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "hi"}], stream=True
        )
        chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Hello"
