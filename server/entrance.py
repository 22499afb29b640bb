"""The first gate of every request: it gives an id, normalizes the path and checks the framing.

All later gates, the API key's among them, use the path that is set here.
"""

from __future__ import annotations

import re
import uuid
from typing import Any
from urllib.parse import unquote

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_ID_LENGTH = 128  # characters of a client's X-Request-ID

_ID = re.compile(rb"[\x21-\x7e]{1,%d}" % MAX_ID_LENGTH)
_ABSOLUTE = re.compile(rb"https?://[^/?#]+(?=/|$)", re.IGNORECASE)


class Entrance:
    """Puts `request_id` into the request's state, and into the answer's X-Request-ID."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sent = [value for name, value in scope["headers"] if name == b"x-request-id"]
        known = len(sent) == 1 and _ID.fullmatch(sent[0])
        request_id = sent[0].decode() if known else uuid.uuid4().hex
        names = {name for name, _ in scope["headers"]}
        # A proxy in front of us may have read another length, and would take the rest for another request.
        close = {b"content-length", b"transfer-encoding"} <= names

        async def named_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(raw=list(message.get("headers", ())))
                headers["X-Request-ID"] = request_id
                if close:
                    headers["Connection"] = "close"
                message = {**message, "headers": headers.raw}
            await send(message)

        state = {**scope.get("state", {}), "request_id": request_id}
        await self._app({**scope, **_normal_path(scope), "state": state}, receive, named_send)


def _normal_path(scope: Scope) -> dict[str, Any]:
    """`path` and `raw_path` without scheme and host, which proxies send, and without slashes at the end."""
    path: str = scope["path"]
    raw: bytes = scope.get("raw_path") or path.encode()
    if found := _ABSOLUTE.match(raw):
        raw = raw[found.end() :] or b"/"
        path = unquote(raw.decode("ascii"))
    return {"path": path.rstrip("/") or "/", "raw_path": raw}
