"""What the routes work with, gathered in one object, and the two interfaces the server needs from below."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any, Protocol

from fastapi import Request

from engine.messages import ModelInfo, RequestOutput, SamplingParams
from server.logprobs import TokenTexts
from server.metrics import Metrics
from server.settings import ServerSettings


class Engine(Protocol):
    """The part of `engine.client.EngineClient` that serves requests."""

    @property
    def info(self) -> ModelInfo: ...

    @property
    def num_restarts(self) -> int: ...

    def is_healthy(self) -> bool: ...

    def num_in_flight(self) -> int: ...

    def generate(
        self, request_id: str, prompt_token_ids: list[int], sampling: SamplingParams
    ) -> AsyncGenerator[RequestOutput, None]:
        """Outputs of one request; closing the generator before the last one aborts the request."""
        ...


class Tokenizer(Protocol):
    """The part of `engine.model.tokenizer.ChatTokenizer` that the server uses; safe to call from threads."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]: ...

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str: ...

    def encode_chat(self, messages: list[dict[str, Any]]) -> list[int]: ...


class Lifecycle:
    """Counts requests in flight and says when the server has begun to stop."""

    def __init__(self) -> None:
        self.stopping = False
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def enter(self) -> None:
        self._in_flight += 1
        self._idle.clear()

    def leave(self) -> None:
        self._in_flight -= 1
        if self._in_flight == 0:
            self._idle.set()

    async def wait_idle(self) -> None:
        await self._idle.wait()


@dataclass(frozen=True)
class Services:
    settings: ServerSettings
    engine: Engine
    tokenizer: Tokenizer
    metrics: Metrics
    token_texts: TokenTexts
    lifecycle: Lifecycle = field(default_factory=Lifecycle)
    started_at: int = field(default_factory=lambda: int(time.time()))


def services(request: Request) -> Services:
    """The services of the app that got `request`."""
    found: Services = request.app.state.services
    return found
