"""Renders the model's own chat template, in a helper process whose memory and time the kernel limits.

All templates and threads of this process share the helpers, which are kept between requests. A helper that
exceeds its limits is killed: its request gets an error, and the next one starts another helper.
"""

from __future__ import annotations

import atexit
import json
import queue
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Connection
from typing import Any

from engine.errors import ModelError, RequestError
from engine.text.template_worker import NOT_COMPILED, READY, RENDERED, TOO_LONG

MAX_HELPERS = 4
START_SECONDS = 60.0  # Python's own start takes a tenth of a second, on a busy machine far more
GROW_SECONDS = 0.05  # a rendering usually takes under a millisecond; after this, start another


@dataclass(frozen=True, kw_only=True)
class RenderLimits:
    """What one rendering may take. `memory` is a helper's whole address space in bytes."""

    seconds: float = 5.0
    characters: int = 16 * 2**20
    memory: int = 512 * 2**20


class ChatTemplate:
    """One template. Safe to use from several threads."""

    def __init__(self, source: str, renderers: Renderers | None = None) -> None:
        """Raises ModelError for a source that does not compile."""
        self._source = source
        self._renderers = renderers or shared_renderers()
        answer = self._renderers.ask(self._request(None))
        if answer is None:
            raise ModelError("the model's chat template takes too much time or memory to compile")
        if answer.startswith(NOT_COMPILED):
            raise ModelError(f"the model's chat template does not compile: {_text(answer)}")

    def render(self, variables: dict[str, Any]) -> str:
        """The rendered text. Raises RequestError for what the template refuses or out of limits."""
        answer = self._renderers.ask(self._request(variables))
        if answer is None:
            message = "the model's chat template took too long to render these messages, or too much memory"
        elif answer.startswith(RENDERED):
            return _text(answer)
        elif answer.startswith(TOO_LONG):
            message = "the rendered conversation is too long"
        else:
            message = f"the model's chat template refuses these messages: {_text(answer)}"
        raise RequestError("messages", message)

    def _request(self, variables: dict[str, Any] | None) -> bytes:
        try:
            request = json.dumps([self._source, variables], ensure_ascii=False)
        except RecursionError as error:
            raise RequestError("messages", "the messages are nested too deeply") from error
        return request.encode("utf-8", "surrogatepass")


def _text(answer: bytes) -> str:
    return answer[1:].decode("utf-8", "surrogatepass")


class Renderers:
    """The helper processes: an idle one answers, another is started where all stay busy."""

    def __init__(self, limits: RenderLimits | None = None, max_helpers: int = MAX_HELPERS) -> None:
        self._limits = limits or RenderLimits()
        self._max_helpers = max_helpers
        self._idle: queue.LifoQueue[_Helper] = queue.LifoQueue()
        self._num_helpers = 0  # idle, busy and starting ones
        self._lock = threading.Lock()

    def ask(self, request: bytes) -> bytes | None:
        """A helper's answer; None where it exceeded its limits. Raises ModelError where none can start."""
        helper = self._take()
        try:
            answer = helper.ask(request, self._limits.seconds)
        except (OSError, EOFError):  # late, or ended by its limits
            self._end(helper)
            return None
        except BaseException:
            self._end(helper)  # else its answer would be taken for the answer to the next request
            raise
        self._idle.put(helper)
        return answer

    def close(self) -> None:
        """End the idle helpers. The others end when this process does."""
        while True:
            try:
                self._end(self._idle.get_nowait())
            except queue.Empty:
                return

    def _take(self) -> _Helper:
        while True:
            try:
                helper = self._idle.get(timeout=GROW_SECONDS if self._num_helpers else 0)
            except queue.Empty:
                started = self._start()
                if started is not None:
                    return started
                continue
            if helper.is_alive():
                return helper
            self._end(helper)  # killed from outside while nobody used it

    def _start(self) -> _Helper | None:
        with self._lock:
            if self._num_helpers == self._max_helpers:
                return None
            self._num_helpers += 1
        try:
            return _Helper(self._limits)
        except BaseException:
            with self._lock:
                self._num_helpers -= 1
            raise

    def _end(self, helper: _Helper) -> None:
        helper.end()
        with self._lock:
            self._num_helpers -= 1


class _Helper:
    """One process of `engine.text.template_worker`, and the socket to it."""

    def __init__(self, limits: RenderLimits) -> None:
        """Raises ModelError where it cannot be started."""
        ours, theirs = socket.socketpair()
        with ours, theirs:
            # -P: do not import modules from the current directory.
            command = [sys.executable, "-P", "-m", "engine.text.template_worker", str(theirs.fileno())]
            command += [str(limits.seconds), str(limits.characters), str(limits.memory)]
            try:
                self._process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()]
                )
            except OSError as error:
                raise ModelError(f"the process that renders chat templates cannot start: {error}") from error
            self._connection = Connection(ours.detach())
        try:
            ready = self._connection.poll(START_SECONDS) and self._connection.recv_bytes() == READY
        except (OSError, EOFError):
            ready = False
        if not ready:
            self.end()
            raise ModelError("the process that renders chat templates did not start; stderr says why")

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, request: bytes, seconds: float) -> bytes:
        """Raises TimeoutError when it is late, EOFError or another OSError when it has ended."""
        self._connection.send_bytes(request)
        if not self._connection.poll(seconds):
            raise TimeoutError
        return self._connection.recv_bytes()

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._connection.close()


@cache
def shared_renderers() -> Renderers:
    """The helpers of this process."""
    renderers = Renderers()
    atexit.register(renderers.close)
    return renderers
