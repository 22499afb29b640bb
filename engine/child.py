"""One engine process and the connection to it, as the server holds it. Without torch."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import sys

from engine import channel
from engine.host import brief_waiting
from engine.messages import ToEngine, ToServer

logger = logging.getLogger(__name__)

_MODULE = "engine.process"
_KILL_SECONDS = 10.0  # that a killed process has to go; the kernel may keep one that waits for a device


class EngineProcess:
    """A running process. Whoever starts one ends it with `end`."""

    def __init__(
        self, process: asyncio.subprocess.Process, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer

    @classmethod
    async def start(cls) -> EngineProcess:
        """Start a process at the other end of a socket. Raises OSError."""
        ours, theirs = socket.socketpair()
        process: asyncio.subprocess.Process | None = None
        try:
            with theirs:
                # -P: not the modules that happen to lie in the directory the server was started from.
                command = (sys.executable, "-P", "-m", _MODULE, str(theirs.fileno()))
                creating = asyncio.ensure_future(
                    asyncio.create_subprocess_exec(
                        *command, pass_fds=[theirs.fileno()], env=brief_waiting(os.environ)
                    )
                )
                try:
                    process = await asyncio.shield(creating)
                except asyncio.CancelledError:
                    process = await creating
                    raise
            reader, writer = await asyncio.open_connection(sock=ours)
        except BaseException:
            ours.close()
            if process is not None:
                await _kill(process)
            raise
        return cls(process, reader, writer)

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, message: ToEngine) -> None:
        self._writer.write(channel.frame(message))

    async def receive(self) -> ToServer | None:
        """The next message, None when the process has gone."""
        return await channel.receive_async(self._reader)

    async def end(self, patience: float = 0.0) -> int | None:
        """Close the connection, which ends the process, and kill it where that takes longer than `patience`
        seconds. Its exit code; None where not even that ended it."""
        self._writer.close()
        try:
            code: int | None = await asyncio.wait_for(self._process.wait(), patience)
        except TimeoutError:
            code = await _kill(self._process)
        if code is None:
            self._writer.transport.abort()
        with contextlib.suppress(OSError):  # what it did not read is lost with it
            await self._writer.wait_closed()
        return code


async def _kill(process: asyncio.subprocess.Process) -> int | None:
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    try:
        return await asyncio.wait_for(process.wait(), _KILL_SECONDS)
    except TimeoutError:
        logger.error("Process %d was killed and does not go; it is left behind.", process.pid)
        return None
