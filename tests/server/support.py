"""What server tests share: an app over a fake engine, a live server on a loopback port, small requests."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI

from server.app import create_app
from server.metrics import Metrics
from server.run import http_config
from server.settings import ServerSettings
from tests.fake_engine import ByteTokenizer, FakeEngine

MODEL = "fake-model"
KEY = "secret-key"
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
ROUTES = (CHAT, COMPLETIONS)


def body_for(route: str, **fields: Any) -> dict[str, Any]:
    """The smallest valid body of a route, with `fields` on top."""
    if route == CHAT:
        return {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], **fields}
    return {"model": MODEL, "prompt": "hi", "max_tokens": 100, **fields}


def app_for(engine: FakeEngine, **settings: Any) -> FastAPI:
    metrics = Metrics(MODEL)
    engine.on_step = metrics.on_step
    return create_app(ServerSettings(served_model_name=MODEL, **settings), engine, ByteTokenizer(), metrics)


def client_for(app: FastAPI, **options: Any) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://server", **options)


@contextlib.asynccontextmanager
async def live(app: FastAPI) -> AsyncIterator[str]:
    """Address of `app` behind a real HTTP server on a free loopback port."""
    config = http_config(app, app.state.services.settings)
    config.port = 0
    server = uvicorn.Server(config)
    running = asyncio.ensure_future(server._serve())
    while not server.started:
        await asyncio.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        server.force_exit = True
        await running


async def eventually(condition: Callable[[], object], seconds: float = 5.0) -> None:
    """Wait until `condition` holds."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"still not true after {seconds} s")
        await asyncio.sleep(0.005)


def events(text: str) -> list[dict[str, Any]]:
    """The events of a stream; checks that [DONE] is the last."""
    data = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: ")]
    assert data.pop() == "[DONE]"
    return [json.loads(item) for item in data]


def streamed_text(chunks: list[dict[str, Any]]) -> str:
    """The joined text of either route's chunks."""
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    return "".join(c["delta"].get("content", "") if "delta" in c else c["text"] for c in choices)


def full_text(answer: dict[str, Any]) -> str:
    choice = answer["choices"][0]
    text: str = choice["message"]["content"] if "message" in choice else choice["text"]
    return text
