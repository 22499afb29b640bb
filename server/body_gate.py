"""The gate that reads a request's whole body, up to a limit, and unpacks one that comes compressed."""

from __future__ import annotations

import asyncio
import zlib

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import ApiError

DISCARD_FACTOR = 16  # times the size limit that is read and thrown away to let a client see its 413
READ_TIMEOUT = 60.0  # seconds for a whole body
_GZIP = 16 + zlib.MAX_WBITS  # as zlib wants to be told the format


class BodyGate:
    """Reads the whole body, up to a limit, before the app runs; the app gets it as one message.

    The limit holds for what was sent and for what a compressed body unpacks to.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            body = await self._body(scope, receive)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        if body is None:
            return
        message: Message | None = {"type": "http.request", "body": body, "more_body": False}

        async def replay() -> Message:
            nonlocal message
            if message is None:
                return await receive()
            first, message = message, None
            return first

        await self._app(scope, replay, send)

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """The body as it was before compression, None when the client went. Raises ApiError."""
        try:
            async with asyncio.timeout(READ_TIMEOUT):
                body = await self._read(scope, receive)
        except TimeoutError:
            raise ApiError(
                408, "The request's body took too long to arrive.", headers={"Connection": "close"}
            ) from None
        encoding = ",".join(Headers(scope=scope).getlist("content-encoding")).strip().lower()
        if not body or encoding in ("", "identity"):
            return body
        if encoding not in ("gzip", "x-gzip"):
            raise ApiError(
                415,
                "A body's 'Content-Encoding' can be gzip, or be left out.",
                headers={"Accept-Encoding": "gzip"},
            )
        return await asyncio.to_thread(self._unpack, body)

    def _unpack(self, body: bytes) -> bytes:
        """What was compressed by gzip. Raises ApiError: 413 for too much, 400 for no whole gzip stream."""
        stream = zlib.decompressobj(_GZIP)
        try:
            unpacked = stream.decompress(body, self._max_bytes + 1)
        except zlib.error:
            raise _no_gzip() from None
        if len(unpacked) > self._max_bytes:
            raise self._too_large()
        if not stream.eof or stream.unused_data:
            raise _no_gzip()
        return unpacked

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The body as it was sent, None when the client went. Raises ApiError for one that is too large."""
        discard = self._max_bytes * DISCARD_FACTOR
        declared = Headers(scope=scope).get("content-length", "0")
        if declared.isdigit() and int(declared) > discard:
            raise self._too_large()
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
                    raise self._too_large()
            if not message.get("more_body", False):
                if size > self._max_bytes:
                    raise self._too_large()
                return b"".join(chunks)

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"The request's body is larger than the {self._max_bytes} bytes this server takes.",
            code="request_too_large",
            headers={"Connection": "close"},
        )


def _no_gzip() -> ApiError:
    return ApiError(400, "The body says that it is gzip, and is no whole gzip stream.")
