"""What the routes work with, gathered in one object."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request

from server.interfaces import Engine, Tokenizer
from server.logprobs import TokenTexts
from server.metrics import Metrics
from server.settings import ServerSettings


class Lifecycle:
    """Knows the requests in flight, whether the server is stopping, and whether it has begun to cut requests
    off."""

    def __init__(self) -> None:
        self.stopping = False
        self.cutting_off = False
        self._in_flight: set[asyncio.Task[Any]] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    @contextmanager
    def request(self) -> Generator[None, None, None]:
        """Count the current task among those in flight."""
        task = asyncio.current_task()
        assert task is not None  # ASGI servers run each request in a task
        self._in_flight.add(task)
        self._idle.clear()
        try:
            yield
        finally:
            self._in_flight.discard(task)
            if not self._in_flight:
                self._idle.set()

    async def wait_idle(self, seconds: float) -> bool:
        """Wait until nothing is in flight; False where that took longer than `seconds`."""
        try:
            await asyncio.wait_for(self._idle.wait(), seconds)
        except TimeoutError:
            return False
        return True

    def cut_off(self) -> None:
        """End every request in flight."""
        self.cutting_off = True
        for task in self._in_flight:
            task.cancel()


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


def cache_scope(request: Request) -> str:
    """Whose cached prefixes `request` shares. The gate that asks for keys has set it."""
    found: str = request.state.cache_scope
    return found
