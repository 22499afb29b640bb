"""Server-sent events, and how the server notices that a client has gone, in a stream or not."""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Awaitable
from typing import TypeVar

import anyio
from fastapi import Request
from pydantic import BaseModel
from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import SendTimeoutError
from starlette.types import Receive, Scope, Send

from engine.errors import GorgonError
from server.errors import ClientDisconnectedError, GenerationError, to_api_error
from server.generation import Generation, Piece
from server.protocol.common import StreamOptions

logger = logging.getLogger("gorgon.server")

T = TypeVar("T")

SEND_TIMEOUT = 60.0  # seconds that a client may leave its socket full before its request is aborted
HEADERS_SECONDS = 0.25  # wait for the first token: until then a failure can have a status
COMMENT_SECONDS = 5.0  # seconds between comments, which keep proxies and clients from giving up
COMMENT = "keep-alive"
DONE = b"data: [DONE]\n\n"

# Valid inside JSON, but readers that split lines as Unicode does would break an event there.
_LINE_BREAKS = str.maketrans({"\x85": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"})


def event(data: str) -> bytes:
    """One event of a stream; `data` is JSON on one line."""
    return b"data: " + data.translate(_LINE_BREAKS).encode() + b"\n\n"


async def until_disconnect(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client goes. Raises ClientDisconnectedError then.

    The body must have been read before: whatever arrives now means that the client has gone.
    """

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(watch())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnectedError
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def collect(request: Request, generation: Generation) -> list[Piece]:
    """All pieces of an answer that is not streamed."""

    async def read() -> list[Piece]:
        return [piece async for piece in generation.pieces()]

    return await until_disconnect(request, read())


class _Source:
    """The pieces of an answer, then None. The first piece is started at once. Must be closed."""

    def __init__(self, pieces: AsyncGenerator[Piece, None]) -> None:
        self._pieces = pieces
        self.first = asyncio.ensure_future(self.next())

    async def next(self) -> Piece | None:
        return await anext(self._pieces, None)

    async def close(self) -> None:
        """End the request if it still runs."""
        self.first.cancel()
        await asyncio.gather(self.first, return_exceptions=True)
        await self._pieces.aclose()


class _EventStream(EventSourceResponse):
    """Closes the pieces however the response ends, even when the client goes before the first event."""

    def __init__(self, content: AsyncGenerator[bytes, None], source: _Source) -> None:
        super().__init__(
            content,
            sep="\n",
            send_timeout=SEND_TIMEOUT,
            ping=COMMENT_SECONDS,
            ping_message_factory=lambda: ServerSentEvent(comment=COMMENT, sep="\n"),
        )
        self._content = content
        self._source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except SendTimeoutError:
            logger.warning("client stopped reading its stream; request given up")
        finally:
            with anyio.CancelScope(shield=True):
                await self._source.close()
                await self._content.aclose()


class ChunkWriter(ABC):
    """What the two endpoints do differently in a stream. Chunks are pydantic models."""

    def __init__(self, options: StreamOptions | None) -> None:
        self._include_usage = options is not None and bool(options.include_usage)

    @abstractmethod
    def first(self) -> list[BaseModel]:
        """Chunks that come before any text."""

    @abstractmethod
    def piece(self, piece: Piece) -> BaseModel: ...

    @abstractmethod
    def end(self, generation: Generation) -> BaseModel:
        """The chunk with the finish reason."""

    @abstractmethod
    def usage(self, generation: Generation) -> BaseModel:
        """The chunk with the usage alone."""

    def last(self, generation: Generation) -> list[BaseModel]:
        """The chunk with the finish reason, and the one with the usage where it was asked for."""
        end = self.end(generation)
        return [end, self.usage(generation)] if self._include_usage else [end]


async def stream(request: Request, generation: Generation, writer: ChunkWriter) -> EventSourceResponse:
    """A streamed answer. A failure within HEADERS_SECONDS is a plain error, a later one is an event."""
    source = _Source(generation.pieces())
    try:
        await until_disconnect(request, asyncio.wait({source.first}, timeout=HEADERS_SECONDS))
        if source.first.done():
            source.first.result()
    except BaseException:
        await source.close()
        raise
    return _EventStream(_events(source, generation, writer), source)


async def _events(
    source: _Source, generation: Generation, writer: ChunkWriter
) -> AsyncGenerator[bytes, None]:
    if not source.first.done():
        yield f": {COMMENT}\n\n".encode()  # some proxies send the headers on only with the first data
    try:
        piece = await source.first
        for chunk in writer.first():
            yield event(chunk.model_dump_json())
        while piece is not None:
            if piece.text or piece.logprobs:
                yield event(writer.piece(piece).model_dump_json())
            piece = await source.next()
    except Exception as error:
        foreseen = isinstance(error, (GenerationError, GorgonError))
        name, request_id = generation.request_id, generation.http_request_id
        logger.error(
            "%s failed: %s; request %s", name, error, request_id, exc_info=None if foreseen else error
        )
        yield event(to_api_error(error, request_id).body())
        return
    for chunk in writer.last(generation):
        yield event(chunk.model_dump_json())
    yield DONE
