"""The server's side of the process border: starts the engine process, feeds it requests, restarts it.

Without torch. One task reads the engine's messages and hands them to the requests they belong to; when the
engine dies, it fails them and starts another.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import sys
import time
from collections.abc import AsyncGenerator, Callable

from engine import channel
from engine.config import EngineConfig
from engine.errors import (
    EngineDeadError,
    EngineStartError,
    EngineStoppedError,
    OverloadedError,
    RequestError,
)
from engine.messages import (
    AbortRequest,
    AddRequest,
    Configure,
    EngineFailed,
    EngineReady,
    ModelInfo,
    RequestOutput,
    RequestRefused,
    SamplingParams,
    StepOutput,
    StepStats,
    ToEngine,
)

logger = logging.getLogger(__name__)

_STOPPED = "The server is shutting down."

_QUEUE_FACTOR = 16  # requests in flight per running place; beyond that waiting would outlast any client
_CHECK_SECONDS = 1.0  # between looks at whether the engine makes progress
_STALL_SECONDS = 60.0  # work without a step for so long is no progress
_KILL_SECONDS = 300.0  # no step is so slow: the engine hangs and is replaced
_RESTART_SECONDS = (0.0, 1.0, 5.0, 30.0)  # pauses before the first, second, ... restart in a row
_SETTLED_SECONDS = 120.0  # an engine that lived this long starts the row anew

_Inbox = asyncio.Queue[RequestOutput | Exception]


class EngineClient:
    """One engine process and the requests in it.

    `on_step` is called in the event loop for every step of the engine.
    """

    def __init__(self, config: EngineConfig, on_step: Callable[[StepStats], None] | None = None) -> None:
        self._config = config
        self._on_step = on_step
        self._inboxes: dict[str, _Inbox] = {}
        self._working: set[str] = set()  # sent to the engine and not ended by it; a client may still read
        self._process: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._info: ModelInfo | None = None
        self._ready = False
        self._stopped = False
        self._stalled_for = 0.0  # seconds of work without a message from the engine
        self._num_restarts = 0
        self._supervisor: asyncio.Task[None] | None = None

    @property
    def info(self) -> ModelInfo:
        """What the engine serves. Raises EngineStartError before `start` has succeeded."""
        if self._info is None:
            raise EngineStartError("The engine has not started yet.")
        return self._info

    @property
    def num_restarts(self) -> int:
        return self._num_restarts

    @property
    def process_id(self) -> int | None:
        return self._process.pid if self._process is not None else None

    def num_in_flight(self) -> int:
        return len(self._inboxes)

    def is_healthy(self) -> bool:
        """Whether the engine is up and, where it has work, has lately made a step."""
        return self._ready and self._stalled_for < _STALL_SECONDS

    async def start(self) -> ModelInfo:
        """Start the engine process and wait until it has loaded its model. Raises EngineStartError."""
        reader = await self._spawn()
        self._supervisor = asyncio.create_task(self._supervise(reader), name="engine supervisor")
        return self.info

    async def stop(self) -> None:
        """End the engine process; requests still in it fail with EngineStoppedError."""
        self._ready, self._stopped = False, True
        if self._supervisor is not None:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor
        await self._reap()
        self._fail_requests(EngineStoppedError(_STOPPED))

    async def generate(
        self, request_id: str, prompt_token_ids: list[int], sampling: SamplingParams
    ) -> AsyncGenerator[RequestOutput, None]:
        """Outputs of one request as steps bring them; closing the generator early aborts the request.

        Raises OverloadedError where too many requests are queued, RequestError where the engine refuses this
        one, EngineDeadError where the engine dies with it, EngineStoppedError where it was ended.
        """
        if self._stopped:
            raise EngineStoppedError(_STOPPED)
        if not self._ready:
            raise EngineDeadError("The engine is restarting; try again in a moment.")
        if len(self._inboxes) >= _QUEUE_FACTOR * self.info.max_num_seqs:
            raise OverloadedError(retry_after=5)
        inbox: _Inbox = asyncio.Queue()
        self._inboxes[request_id] = inbox
        finished = False
        try:
            self._send(AddRequest(request_id, prompt_token_ids, sampling))
            self._working.add(request_id)
            while not finished:
                output = await inbox.get()
                if isinstance(output, Exception):
                    finished = True
                    raise output
                finished = output.finish_reason is not None
                yield output
        finally:
            del self._inboxes[request_id]
            if request_id in self._working:
                self._working.discard(request_id)
                self._send(AbortRequest(request_id))

    def _send(self, message: ToEngine) -> None:
        if self._writer is not None:
            self._writer.write(channel.frame(message))

    async def _spawn(self) -> asyncio.StreamReader:
        """Start a process and wait for its word. Raises EngineStartError with the engine's own message."""
        try:
            reader = await self._connect()
        except OSError as error:
            raise EngineStartError(f"The engine process could not be started: {error}") from error
        self._send(Configure(self._config))
        message = await channel.receive_async(reader)
        if isinstance(message, EngineReady):
            self._info = message.info
            self._ready = True
            self._stalled_for = 0.0
            return reader
        await self._reap()
        if isinstance(message, EngineFailed):
            raise EngineStartError(message.message)
        raise EngineStartError("The engine process ended before it was ready; its output above says why.")

    async def _connect(self) -> asyncio.StreamReader:
        """Start a process at the other end of a socket. Raises OSError."""
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                # -P: not the modules that happen to lie in the directory the server was started from.
                command = (sys.executable, "-P", "-m", "engine.process", str(theirs.fileno()))
                creating = asyncio.ensure_future(
                    asyncio.create_subprocess_exec(*command, pass_fds=[theirs.fileno()])
                )
                try:
                    self._process = await asyncio.shield(creating)
                except asyncio.CancelledError:
                    self._process = await creating  # for `stop` to end it
                    raise
            reader, self._writer = await asyncio.open_connection(sock=ours)
        except BaseException:
            ours.close()
            raise
        return reader

    async def _supervise(self, reader: asyncio.StreamReader) -> None:
        failures = 0
        while True:
            started = time.monotonic()
            await self._run(reader)
            self._ready = False
            code = await self._reap()
            logger.error(
                "The engine process is gone (exit code %s), %d requests with it.", code, len(self._working)
            )
            self._fail_requests(
                EngineDeadError("The engine died while it ran this request; it is being restarted.")
            )
            failures = 0 if time.monotonic() - started > _SETTLED_SECONDS else failures
            reader, failures = await self._restart(failures)

    async def _restart(self, failures: int) -> tuple[asyncio.StreamReader, int]:
        while True:
            await asyncio.sleep(_RESTART_SECONDS[min(failures, len(_RESTART_SECONDS) - 1)])
            failures += 1
            self._num_restarts += 1
            try:
                return await self._spawn(), failures
            except Exception as error:  # whatever it was, a later try may succeed
                logger.error("The engine could not be restarted: %s", error)
                await self._reap()

    async def _run(self, reader: asyncio.StreamReader) -> None:
        """Take in what the engine sends until it goes, hangs or sends what cannot be taken in."""
        delivering = asyncio.create_task(self._deliver(reader), name="engine messages")
        try:
            while not (await asyncio.wait({delivering}, timeout=_CHECK_SECONDS))[0]:
                # Counted in looks, not by the clock: a machine that was asleep has not made the engine hang.
                self._stalled_for = self._stalled_for + _CHECK_SECONDS if self._working else 0.0
                if self._stalled_for >= _KILL_SECONDS and self._process is not None:
                    logger.error("The engine has made no step for %.0f s and is killed.", self._stalled_for)
                    self._process.kill()
                    return
            delivering.result()
        except Exception:
            logger.exception("What the engine sent could not be taken in; it is replaced.")
        finally:
            delivering.cancel()
            await asyncio.gather(delivering, return_exceptions=True)

    async def _deliver(self, reader: asyncio.StreamReader) -> None:
        """Hand the engine's messages to their requests until the engine goes."""
        while (message := await channel.receive_async(reader)) is not None:
            self._stalled_for = 0.0
            if isinstance(message, StepOutput):
                for output in message.outputs:
                    self._hand(output.request_id, output, output.finish_reason is not None)
                if self._on_step is not None:
                    self._on_step(message.stats)
            elif isinstance(message, RequestRefused):
                self._hand(message.request_id, RequestError(message.parameter, message.message), True)

    def _hand(self, request_id: str, output: RequestOutput | Exception, last: bool) -> None:
        if last:
            self._working.discard(request_id)
        if (inbox := self._inboxes.get(request_id)) is not None:
            inbox.put_nowait(output)

    async def _reap(self) -> int | None:
        """Close the connection, which ends the process, and collect its exit code."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()
        process = self._process
        if process is None:
            return None
        try:
            code = await asyncio.wait_for(process.wait(), timeout=5.0)
        except TimeoutError:
            process.kill()
            code = await process.wait()
        self._process = None  # not before: a cancelled call leaves it to the next
        if writer is not None:
            with contextlib.suppress(OSError):  # what it did not read is lost with it
                await writer.wait_closed()
        return code

    def _fail_requests(self, error: EngineDeadError) -> None:
        self._working.clear()
        for inbox in self._inboxes.values():
            inbox.put_nowait(error)
