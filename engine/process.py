"""The engine process: one thread reads messages, the main thread steps. Started by `engine.client` with a
connected socket's file descriptor as its argument; it ends when that socket closes."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import queue
import signal
import socket
import sys
import threading

from engine import channel
from engine.build import build
from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import GorgonError, GraphCaptureError, RequestError
from engine.messages import (
    AbortRequest,
    AddRequest,
    Configure,
    EngineFailed,
    EngineReady,
    RequestRefused,
    ToEngine,
)
from engine.runner.device import is_out_of_memory
from heads.errors import HeadsError
from trees.family import TreeError


def main(descriptor: int) -> int:
    # A terminal sends Ctrl-C, and SIGHUP when it closes, to the whole group. Service managers send SIGTERM to
    # every process. The server decides when to end, because requests may still be running. This process ends
    # with its socket.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")  # as the server's
    with socket.socket(fileno=descriptor) as connection, contextlib.suppress(ConnectionError):
        return _serve(connection)
    return 0  # the server is gone


def _serve(connection: socket.socket) -> int:
    """Load and step for ever. Raises ConnectionError once nobody reads what it sends."""
    inbox: queue.SimpleQueue[ToEngine] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(connection, inbox), name="inbox", daemon=True).start()
    first = inbox.get()
    if not isinstance(first, Configure):
        return 1
    engine = _load(first.config, connection)
    if engine is None:
        return 1
    connection.sendall(channel.frame(EngineReady(engine.info)))
    while True:
        _take_messages(engine, connection, inbox)
        connection.sendall(channel.frame(engine.step()))


def _load(config: EngineConfig, connection: socket.socket) -> Engine | None:
    captures_failed = False
    try:
        engine = build(config)
        # What is loaded stays, so that garbage collections between steps need not look through it.
        gc.collect()
        gc.freeze()
        return engine
    except (GorgonError, HeadsError, TreeError) as error:
        message, captures_failed = str(error), isinstance(error, GraphCaptureError)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        message = (
            "There is not enough memory for the engine; lower --kv-cache-memory, --gpu-memory-utilization, "
            "--max-num-seqs or --max-num-batched-tokens, or take a smaller model."
        )
    connection.sendall(channel.frame(EngineFailed(message, captures_failed)))
    return None


def _read(connection: socket.socket, inbox: queue.SimpleQueue[ToEngine]) -> None:
    with contextlib.suppress(ConnectionError):
        while (message := channel.receive(connection)) is not None:
            inbox.put(message)
    os._exit(0)  # the server is gone; nobody waits for what still runs


def _take_messages(engine: Engine, connection: socket.socket, inbox: queue.SimpleQueue[ToEngine]) -> None:
    """Apply what has come in; wait only where there is nothing to compute."""
    while not engine.has_work() or not inbox.empty():
        message = inbox.get()
        if isinstance(message, AbortRequest):
            engine.abort(message.request_id)
        elif isinstance(message, AddRequest):
            try:
                engine.add_request(message)
            except RequestError as error:
                refusal = RequestRefused(message.request_id, error.parameter, str(error))
                connection.sendall(channel.frame(refusal))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
