"""The gates every request passes before a route sees it, as plain ASGI: stopping, key, body size."""

from __future__ import annotations

import asyncio
import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import ApiError, stopping
from server.metrics import Metrics
from server.services import Lifecycle

HEALTH, METRICS = "/health", "/metrics"  # answered even while the server is stopping
DISCARD_FACTOR = 16  # times the size limit that is read and thrown away to let a client see its 413
READ_TIMEOUT = 60.0  # seconds for a whole body


class LifecycleGate:
    """Counts requests in flight and turns new ones away once the server is stopping."""

    def __init__(self, app: ASGIApp, lifecycle: Lifecycle, metrics: Metrics) -> None:
        self._app = app
        self._lifecycle = lifecycle
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        started = False

        async def counting_send(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                if message["status"] >= 400:
                    self._metrics.http_rejections.labels(message["status"]).inc()
            await send(message)

        if self._lifecycle.stopping and scope["path"] not in (HEALTH, METRICS):
            await stopping().response()(scope, receive, counting_send)
            return
        with self._lifecycle.request():
            try:
                await self._app(scope, receive, counting_send)
            except asyncio.CancelledError:
                if not self._lifecycle.cutting_off:
                    raise
                if not started:
                    await stopping().response()(scope, receive, counting_send)


class KeyGate:
    """Asks for the API key on every path but /health, and but /metrics with `open_metrics`.

    The path is the one routes are matched against (`scope["path"]`), never one built from the Host header.
    """

    def __init__(self, app: ASGIApp, api_key: str | None, open_metrics: bool) -> None:
        self._app = app
        self._open = frozenset({HEALTH, METRICS} if open_metrics else {HEALTH})
        self._expected = None if api_key is None else f"bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._expected is None or scope["type"] == "lifespan" or self._admits(self._expected, scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            error = ApiError(
                401,
                "Missing or wrong API key; send it as 'Authorization: Bearer KEY'.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
            await error.response()(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _admits(self, expected: bytes, scope: Scope) -> bool:
        if scope["type"] == "http" and scope["path"] in self._open:
            return True
        sent = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(sent) != 1:
            return False
        scheme, space, key = sent[0].partition(b" ")
        return hmac.compare_digest(scheme.lower() + space + key, expected)


class BodyGate:
    """Reads the whole body, up to a limit, before the app runs; the app gets it as one message."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(READ_TIMEOUT):
                body = await self._read(scope, receive)
        except TimeoutError:
            body = ApiError(
                408, "The request's body took too long to arrive.", headers={"Connection": "close"}
            )
        if body is None:
            return
        if isinstance(body, ApiError):
            await body.response()(scope, receive, send)
            return
        message: Message | None = {"type": "http.request", "body": body, "more_body": False}

        async def replay() -> Message:
            nonlocal message
            if message is None:
                return await receive()
            first, message = message, None
            return first

        await self._app(scope, replay, send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | ApiError | None:
        """The body, or the answer for one that is too large, or None when the client went."""
        discard = self._max_bytes * DISCARD_FACTOR
        declared = Headers(scope=scope).get("content-length", "0")
        if declared.isdigit() and int(declared) > discard:
            return self._too_large()
        chunks: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            chunk = message.get("body", b"")
            size += len(chunk)
            if size <= self._max_bytes:
                chunks.append(chunk)
            else:
                # Many clients look for an answer only once they have sent everything.
                chunks.clear()
                if size > discard:
                    return self._too_large()
            if not message.get("more_body", False):
                return b"".join(chunks) if size <= self._max_bytes else self._too_large()

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"The request's body is larger than the {self._max_bytes} bytes this server takes.",
            code="request_too_large",
            headers={"Connection": "close"},
        )
