"""Runs a server from start to end: engine up, HTTP up, signals, drain, everything down."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import logging
import os
import shlex
import signal
import socket
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from sse_starlette.sse import AppStatus

from engine.client import EngineClient
from engine.config import EngineConfig
from engine.errors import GorgonError
from engine.messages import ModelInfo
from engine.text.tokenizer import load_chat_tokenizer
from server.app import create_app
from server.interfaces import Engine, Tokenizer
from server.metrics import Metrics
from server.services import Services
from server.settings import ServerSettings

logger = logging.getLogger("gorgon.server")

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
BACKLOG = 2048
CUT_OFF_SECONDS = 2.0  # for requests to end after they failed, and again once they are cancelled


class StopSignals:
    """The first SIGTERM, SIGINT or SIGHUP asks the server to stop. A second one ends the process at once.

    A SIGHUP that was ignored from the start stays ignored, because nohup asks to outlive the terminal.
    """

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            if number is not signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                loop.add_signal_handler(number, self._on_signal, number)

    def _on_signal(self, number: signal.Signals) -> None:
        if self.asked.is_set():
            os._exit(128 + number)  # the engine process ends when its pipe to this one closes
        logger.info("%s: stopping; a second one exits at once", number.name)
        self.asked.set()


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers, which would close running streams."""

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


def serve(settings: ServerSettings, engine_config: EngineConfig) -> int:
    """Serve until a signal comes. Returns the exit status. A failed start is one line on stderr."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        with listen(settings) as listener, asyncio.Runner(loop_factory=_loop_factory()) as runner:
            return runner.run(_serve(settings, engine_config, listener))
    except GorgonError as error:
        print(f"gorgon: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop where it is installed."""
    if importlib.util.find_spec("uvloop") is None:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = importlib.import_module("uvloop").new_event_loop
    return factory


def listen(settings: ServerSettings) -> socket.socket:
    """Take the port before the model loads, so that a port in use is known at once."""
    listener: socket.socket | None = None
    try:
        family = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((settings.host, settings.port))
    except (OSError, UnicodeError) as error:  # name services take no label of more than 63 characters
        if listener is not None:
            listener.close()
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise GorgonError(
            f"cannot listen on {settings.host} port {settings.port}: {reason}; try another --host or --port"
        ) from error
    return listener


async def _serve(settings: ServerSettings, engine_config: EngineConfig, listener: socket.socket) -> int:
    stop = StopSignals()
    metrics = Metrics(settings.served_model_name)
    engine = EngineClient(engine_config, on_step=metrics.on_step)
    starting = asyncio.ensure_future(engine.start())
    loading = asyncio.ensure_future(
        asyncio.to_thread(load_chat_tokenizer, Path(engine_config.model_dir), settings.parse_special)
    )
    asked = asyncio.ensure_future(stop.asked.wait())
    try:
        for work in (loading, starting):
            await asyncio.wait({work, asked}, return_when=asyncio.FIRST_COMPLETED)
            if stop.asked.is_set():
                return 0
            work.result()  # raises what went wrong
        logger.info("engine: %s", describe(starting.result()))
        await serve_http(settings, engine, loading.result(), metrics, listener, stop)
    finally:
        for task in (starting, loading, asked):
            task.cancel()
        await asyncio.gather(starting, loading, asked, return_exceptions=True)
        await engine.stop()
    return 0


async def serve_http(
    settings: ServerSettings,
    engine: Engine,
    tokenizer: Tokenizer,
    metrics: Metrics,
    listener: socket.socket,
    stop: StopSignals,
) -> None:
    """Answer HTTP over a started engine until `stop` asks, then finish what runs within the grace period."""
    AppStatus.enable_automatic_graceful_drain = False  # streams end by themselves, or with the grace period
    app = create_app(settings, engine, tokenizer, metrics)
    services: Services = app.state.services
    server = _Server(http_config(app, settings))
    running = asyncio.ensure_future(server.serve(sockets=[listener]))
    asked = asyncio.ensure_future(stop.asked.wait())
    while not (server.started or running.done()):
        await asyncio.sleep(0.01)
    print(banner(settings, listener.getsockname()[1]), flush=True)

    await asyncio.wait({running, asked}, return_when=asyncio.FIRST_COMPLETED)
    services.lifecycle.stopping = True
    if not await services.lifecycle.wait_idle(settings.shutdown_grace_period):
        logger.warning("the grace period is over; requests still running are cut off")
        engine.cut_off()  # their clients get an error; in a stream it is the last event
        if not await services.lifecycle.wait_idle(CUT_OFF_SECONDS):
            services.lifecycle.cut_off()  # requests that are not in the engine, or whose clients do not read
            await services.lifecycle.wait_idle(CUT_OFF_SECONDS)
    asked.cancel()
    server.should_exit = True
    await running


def http_config(app: FastAPI, settings: ServerSettings) -> uvicorn.Config:
    """The settings of HTTP: protocol, limits, timeouts."""
    return uvicorn.Config(
        app,
        http="h11",  # h11 limits the size of headers, httptools does not
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        backlog=BACKLOG,
        timeout_keep_alive=settings.keep_alive_timeout,
        timeout_graceful_shutdown=1,
    )


def describe(info: ModelInfo) -> str:
    """What the engine made of its configuration, in one line."""
    weights = "" if info.quantization == "none" else f" with {info.quantization} weights"
    cache = "" if info.kv_cache_dtype is None else f" in {info.kv_cache_dtype}"
    guesses = info.heads or "n-grams alone"
    trees = f"{guesses}, trees of up to {info.max_tree_nodes} nodes" if info.max_tree_nodes > 1 else "off"
    return (
        f"{info.architecture} in {info.dtype}{weights} on {info.device}; speculation: {trees}; context of "
        f"{info.max_model_len} tokens; KV cache of {info.num_blocks * info.block_size} tokens{cache}"
    )


def banner(settings: ServerSettings, port: int) -> str:
    """Where the server is, and a chat request to paste into a shell."""
    host = settings.host
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    address = f"[{reachable}]" if ":" in reachable else reachable
    body = {
        "model": settings.served_model_name,
        "messages": [{"role": "user", "content": "Why is the sky blue?"}],
        # A small model at OpenAI's default temperature may ramble until its context is full.
        "temperature": 0,
        "max_tokens": 128,
    }
    variable = "${GORGON_API_KEY%%,*}" if len(settings.api_keys) > 1 else "$GORGON_API_KEY"
    key = f' -H "Authorization: Bearer {variable}"' if settings.api_keys else ""
    return (
        f"{settings.served_model_name} is ready. Try:\n"
        f"curl http://{address}:{port}/v1/chat/completions{key} "
        f"-H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}"
    )
