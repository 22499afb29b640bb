"""The server's side of the process border: starts the engine process, feeds it requests, restarts it.

Without torch. One task reads the engine's messages and hands them to the requests they belong to; when the
engine dies or hangs, it fails them and starts another, and those that come meanwhile wait for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterable
from dataclasses import replace

from engine.child import EngineProcess
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
from engine.watchdog import Watchdog

logger = logging.getLogger(__name__)

_STOPPED = "The server is shutting down."

_QUEUE_FACTOR = 16  # requests in flight per running place; beyond that waiting would outlast any client
_CHECK_SECONDS = 1.0  # between looks at whether the engine makes progress
_WAIT_SECONDS = 120.0  # that a request waits for an engine that is restarting
_EXIT_SECONDS = 5.0  # that an engine which ends by itself gets to tell how
_RESTART_SECONDS = (0.0, 1.0, 5.0, 30.0)  # pauses before the first, second, ... restart in a row
_SETTLED_SECONDS = 120.0  # an engine that lived this long starts the row anew

_DECIDES_TEXT = ("architecture", "vocab_size", "dtype", "device", "quantization", "backend", "kv_cache_dtype")

_Inbox = asyncio.Queue[RequestOutput | Exception]


class EngineClient:
    """One engine process and the requests in it.

    `on_step` is called in the event loop for every step of the engine.

    A request that was in an engine when it died is never given to the next one: it may be what killed it, and
    would take down everybody a second time. Its client is told, and may ask again.
    """

    def __init__(self, config: EngineConfig, on_step: Callable[[StepStats], None] | None = None) -> None:
        self._config = config
        self._on_step = on_step
        self._inboxes: dict[str, _Inbox] = {}
        self._working: set[str] = set()  # sent to the engine and not ended by it; a client may still read
        self._num_waiting = 0  # not sent, because no engine is up
        self._child: EngineProcess | None = None
        self._info: ModelInfo | None = None
        self._up = asyncio.Event()
        self._stopped = False
        self._watchdog = Watchdog(config.watchdog_timeout)
        self._stalled_for = 0.0  # seconds of work without a message from the engine
        self._num_restarts = 0
        self._num_capture_failures = 0
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
    def num_capture_failures(self) -> int:
        """Starts that failed at CUDA graphs. From then on the engine runs without."""
        return self._num_capture_failures

    @property
    def process_id(self) -> int | None:
        return self._child.pid if self._child is not None else None

    def num_in_flight(self) -> int:
        return len(self._inboxes)

    def num_waiting(self) -> int:
        """Requests that wait for an engine to come back."""
        return self._num_waiting

    def is_healthy(self) -> bool:
        """Whether the engine is up and, where it has work, has lately made a step."""
        return self._up.is_set() and not self._stopped and self._stalled_for < self._watchdog.step_limit / 2

    async def start(self) -> ModelInfo:
        """Start the engine process and wait until it has loaded its model. Raises EngineStartError."""
        child = await self._spawn()
        self._supervisor = asyncio.create_task(self._supervise(child), name="engine supervisor")
        return self.info

    def cut_off(self) -> None:
        """Fail all requests with EngineStoppedError and take no more."""
        self._stopped = True
        self._up.set()  # for those that wait for it to find out
        self._fail(self._inboxes, EngineStoppedError(_STOPPED))

    async def stop(self) -> None:
        """End the engine process; requests still in it fail with EngineStoppedError."""
        self.cut_off()
        if self._supervisor is not None:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor
        await self._end_child()

    async def generate(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        sampling: SamplingParams,
        cache_scope: str = "",
    ) -> AsyncGenerator[RequestOutput, None]:
        """Outputs of one request as steps bring them; closing the generator early aborts the request.

        Where the engine is restarting it waits, up to 120 s. Raises OverloadedError where too many requests
        are queued, RequestError where the engine refuses this one, EngineDeadError where the engine dies with
        it or does not come back in time, EngineStoppedError where it was ended.
        """
        if self._stopped:
            raise EngineStoppedError(_STOPPED)
        if len(self._inboxes) >= _QUEUE_FACTOR * self.info.max_num_seqs:
            raise OverloadedError(retry_after=5)
        inbox: _Inbox = asyncio.Queue()
        self._inboxes[request_id] = inbox
        finished = False
        try:
            await self._until_up()
            self._send(AddRequest(request_id, prompt_token_ids, sampling, cache_scope))
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

    async def _until_up(self) -> None:
        """Wait for an engine. Raises EngineDeadError, EngineStoppedError."""
        self._num_waiting += 1
        try:
            async with asyncio.timeout(_WAIT_SECONDS):
                while not (self._up.is_set() or self._stopped):
                    await self._up.wait()
        except TimeoutError:
            raise EngineDeadError("The engine is restarting; try again in a moment.") from None
        finally:
            self._num_waiting -= 1
        if self._stopped:
            raise EngineStoppedError(_STOPPED)

    def _send(self, message: ToEngine) -> None:
        if self._child is not None:
            self._child.send(message)

    async def _spawn(self) -> EngineProcess:
        """Start a process and wait for its word. Raises EngineStartError with the engine's own message."""
        started = time.monotonic()
        try:
            child = self._child = await EngineProcess.start()
        except OSError as error:
            raise EngineStartError(f"The engine process could not be started: {error}") from error
        limit = self._watchdog.start_limit
        child.send(Configure(self._config))
        try:
            async with asyncio.timeout(limit):
                message = await child.receive()
        except TimeoutError:
            self._watchdog.start_overran()
            await self._end_child()
            raise EngineStartError(f"The engine did not load its model within {limit:.0f} s.") from None
        if isinstance(message, EngineReady):
            self._watchdog.started(time.monotonic() - started, message.info.largest_pass_seconds)
            self._take_info(message.info)
            self._stalled_for = 0.0
            self._up.set()
            return child
        await self._end_child(_EXIT_SECONDS)
        if isinstance(message, EngineFailed):
            if message.eager_may_start and not self._config.enforce_eager:
                logger.error("Starting the engine again, without CUDA graphs, slower. %s", message.message)
                self._num_capture_failures += 1
                self._config = replace(self._config, enforce_eager=True)
                return await self._spawn()
            raise EngineStartError(message.message)
        raise EngineStartError("The engine process ended before it was ready; its output above says why.")

    def _take_info(self, info: ModelInfo) -> None:
        """A restarted engine should be what the one before was; what text depends on is looked at."""
        for name in _DECIDES_TEXT if self._info is not None else ():
            before, now = getattr(self._info, name), getattr(info, name)
            if now != before:
                logger.error(
                    "The restarted engine differs from the one before: %s is %s, not %s. Answers may differ, "
                    "too; look for a model file or a compiler that has changed, and restart the server.",
                    *(name, now, before),
                )
        self._info = info

    async def _supervise(self, child: EngineProcess) -> None:
        failures = 0
        while True:
            started = time.monotonic()
            hung = await self._run(child)
            self._up.clear()
            lost = list(self._working)
            self._fail(
                lost, EngineDeadError("The engine died while it ran this request; it is being restarted.")
            )
            code = await self._end_child(0.0 if hung else _EXIT_SECONDS)
            logger.error("The engine process is gone (exit code %s), %d requests with it.", code, len(lost))
            if time.monotonic() - started > _SETTLED_SECONDS:
                failures = 0
            child, failures = await self._restart(failures)

    async def _restart(self, failures: int) -> tuple[EngineProcess, int]:
        while True:
            await asyncio.sleep(_RESTART_SECONDS[min(failures, len(_RESTART_SECONDS) - 1)])
            failures += 1
            self._num_restarts += 1
            try:
                return await self._spawn(), failures
            except Exception as error:  # whatever it was, a later try may succeed
                logger.error("The engine could not be restarted: %s", error)
                await self._end_child()

    async def _run(self, child: EngineProcess) -> bool:
        """Take in what the engine sends until it goes or sends what cannot be taken in, then False, or makes
        no step for too long, then True."""
        delivering = asyncio.create_task(self._deliver(child), name="engine messages")
        try:
            while not (await asyncio.wait({delivering}, timeout=_CHECK_SECONDS))[0]:
                # Counted in looks, not by the clock: a machine that was asleep has not made the engine hang.
                self._stalled_for = self._stalled_for + _CHECK_SECONDS if self._working else 0.0
                if self._stalled_for >= self._watchdog.step_limit:
                    logger.error(
                        "The engine has made no step for %.0f s and is killed; where steps may take longer, "
                        "set --watchdog-timeout.",
                        self._stalled_for,
                    )
                    self._watchdog.step_overran()
                    return True
            delivering.result()
        except Exception:
            logger.exception("What the engine sent could not be taken in; it is replaced.")
        finally:
            delivering.cancel()
            await asyncio.gather(delivering, return_exceptions=True)
        return False

    async def _deliver(self, child: EngineProcess) -> None:
        """Hand the engine's messages to their requests until the engine goes."""
        while (message := await child.receive()) is not None:
            self._stalled_for = 0.0
            if isinstance(message, StepOutput):
                self._watchdog.stepped(message.stats.duration)
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

    async def _end_child(self, patience: float = 0.0) -> int | None:
        """End the process, if there is one; see `EngineProcess.end`."""
        if self._child is None:
            return None
        code = await self._child.end(patience)
        self._child = None  # not before: a cancelled call leaves it to the next
        return code

    def _fail(self, request_ids: Iterable[str], error: EngineDeadError) -> None:
        for request_id in list(request_ids):
            self._hand(request_id, error, last=True)
