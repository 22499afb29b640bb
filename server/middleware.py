"""The gates that turn requests away, as plain ASGI: one while the server stops, one where the key is
missing."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import ApiError, stopping, to_api_error
from server.metrics import Metrics
from server.services import Lifecycle

logger = logging.getLogger("gorgon.server")

HEALTH, METRICS = "/health", "/metrics"  # answered even while the server is stopping
MAX_LOGGED = 200  # characters of a client's own text in a line of the log


class LifecycleGate:
    """Counts requests in flight and turns new ones away once the server is stopping. Logs every refusal, and
    answers unexpected failures."""

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
                    self._note_refusal(scope, message["status"])
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
            except Exception as error:
                if started:
                    raise
                request_id = scope["state"]["request_id"]
                logger.exception("request %s failed", request_id)
                await to_api_error(error, request_id).response()(scope, receive, counting_send)

    def _note_refusal(self, scope: Scope, status: int) -> None:
        """Log one line with method, path and the error's names. The message is left out: it may repeat a
        prompt."""
        self._metrics.http_rejections.labels(status).inc()
        state = scope["state"]
        if (reason := state.get("reason")) is not None:  # /health and lost clients have none
            path, request_id = ascii(scope["path"][:MAX_LOGGED]), state["request_id"]
            logger.warning("%s %s: %d %s; request %s", scope["method"], path, status, reason, request_id)


class KeyGate:
    """Asks for an API key on every path but /health, and but /metrics with `open_metrics`.

    It also notes whose cached prefixes a request shares: where there are several keys, only those of its own
    key. The path is the one that routes are matched against (`scope["path"]`), never one built from the Host
    header.
    """

    def __init__(self, app: ASGIApp, api_keys: Sequence[str], open_metrics: bool) -> None:
        self._app = app
        self._open = frozenset({HEALTH, METRICS} if open_metrics else {HEALTH})
        several = len(set(api_keys)) > 1
        self._known = [
            (_digest(f"bearer {key}".encode()), _scope_of(key) if several else "") for key in api_keys
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        cache_scope = "" if not self._known or scope["type"] == "lifespan" else self._admit(scope)
        if cache_scope is not None:
            scope.setdefault("state", {})["cache_scope"] = cache_scope
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

    def _admit(self, scope: Scope) -> str | None:
        """The cache scope of a request that may pass, None for others."""
        if scope["type"] == "http" and scope["path"] in self._open:
            return ""
        sent = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(sent) != 1:
            return None
        scheme, space, key = sent[0].partition(b" ")
        digest = _digest(scheme.lower() + space + key)
        found = None
        for expected, cache_scope in self._known:  # compare with all keys, so that the time reveals nothing
            if hmac.compare_digest(digest, expected):
                found = cache_scope
        return found


def _digest(credentials: bytes) -> bytes:
    """A digest, so that keys of any length are compared in the same time."""
    return hashlib.sha256(credentials).digest()


def _scope_of(key: str) -> str:
    """A name of the key that is the same in every server and from which the key cannot be computed."""
    return hashlib.blake2b(key.encode(), digest_size=16, person=b"cache scope").hexdigest()
