"""The gate that reads a request's whole body, up to a limit, and decompresses it where it is compressed."""

from __future__ import annotations

import asyncio
import zlib

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import ApiError

DISCARD_FACTOR = 16  # how many times the size limit is read and thrown away, so that a client sees its 413
READ_TIMEOUT = 60.0  # seconds for a whole body
_GZIP = 16 + zlib.MAX_WBITS  # zlib's code for the gzip format


class BodyGate:
    """Reads the whole body, up to a limit, before the app runs. The app gets it as one message.

    The limit holds for the bytes that were sent and for what a compressed body unpacks to.
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
        """The body without its compression. None when the client has gone. Raises ApiError."""
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
        """Decompress gzip. Raises ApiError: 413 where the result is too large, 400 where the stream is
        damaged."""
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
        """The body as it was sent. None when the client has gone. Raises ApiError where it is too large."""
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
                # Many clients read the answer only after they have sent everything.
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
