"""The server as a process with an engine process below it: what signals do to both, and to their clients."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import httpx
import pytest

from tests.engine.processes import is_alive, until
from tests.server.support import ROUTES, body_for

ROOT = Path(__file__).parents[2]
LONG = {"max_tokens": 400, "ignore_eos": True}  # 4 s


@asynccontextmanager
async def served(folder: Path, grace: float = 10.0, *before: str) -> AsyncIterator[Process]:
    """A server of `tests.server.puppet_server`; `before`: a command that starts it."""
    command = (*before, sys.executable, "-m", "tests.server.puppet_server", str(folder), str(grace))
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, env=environ, stdout=PIPE)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        for pid in engines(folder):  # one that is stopped would keep the pipe open
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        await process.communicate()


async def url_of(process: Process) -> str:
    assert process.stdout is not None
    text = (await process.stdout.readline() + await process.stdout.readline()).decode()
    match = re.search(r"http://127\.0\.0\.1:\d+", text)
    assert match is not None, text
    return match[0]


def engines(folder: Path) -> list[int]:
    pids = folder / "pids"
    return [int(line) for line in pids.read_text().split()] if pids.exists() else []


async def test_the_end_of_the_grace_period_is_told_to_streams_and_to_others(tmp_path: Path) -> None:
    async with served(tmp_path, 0.3) as process, httpx.AsyncClient(base_url=await url_of(process)) as client:
        streamed = [
            asyncio.ensure_future(client.post(route, json=body_for(route, stream=True, **LONG)))
            for route in ROUTES
        ]
        whole = [asyncio.ensure_future(client.post(route, json=body_for(route, **LONG))) for route in ROUTES]
        await asyncio.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        for answer in await asyncio.gather(*streamed):
            assert answer.status_code == 200
            lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
            assert len(lines) > 2
            error = json.loads(lines[-1])["error"]
            assert (error["code"], error["type"]) == ("stopping", "service_unavailable_error")
        for answer in await asyncio.gather(*whole):
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "stopping"
        assert await asyncio.wait_for(process.wait(), 20.0) == 0
    assert not is_alive(engines(tmp_path)[0])


async def test_requests_wait_for_an_engine_that_was_killed(tmp_path: Path) -> None:
    async with served(tmp_path) as process, httpx.AsyncClient(base_url=await url_of(process)) as client:
        (tmp_path / "starts").write_text("after 0.3")
        os.kill(engines(tmp_path)[0], signal.SIGKILL)
        while (await client.get("/health")).status_code == 200:
            await asyncio.sleep(0.01)
        asked = asyncio.ensure_future(client.post(ROUTES[0], json=body_for(ROUTES[0], max_tokens=5)))
        await asyncio.sleep(0.05)
        assert (await client.get("/health")).status_code == 503
        assert "gorgon_requests_waiting 1.0" in (await client.get("/metrics")).text
        answer = await asked
        assert answer.status_code == 200
        assert (await client.get("/health")).status_code == 200


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
async def test_a_signal_while_the_model_loads_ends_both_processes(
    tmp_path: Path, number: signal.Signals
) -> None:
    (tmp_path / "starts").write_text("stop" if number == signal.SIGTERM else "hang")
    async with served(tmp_path) as process:
        await until(lambda: len(engines(tmp_path)) == 1)
        began = time.monotonic()
        process.send_signal(number)
        assert await asyncio.wait_for(process.wait(), 20.0) == 0
        assert time.monotonic() - began < 4.0
    assert not is_alive(engines(tmp_path)[0])


async def test_a_server_that_nohup_started_outlives_its_terminal(tmp_path: Path) -> None:
    async with (
        served(tmp_path, 10.0, "nohup") as process,
        httpx.AsyncClient(base_url=await url_of(process)) as client,
    ):
        process.send_signal(signal.SIGHUP)
        os.kill(engines(tmp_path)[0], signal.SIGHUP)
        await asyncio.sleep(0.2)
        assert (await client.post(ROUTES[0], json=body_for(ROUTES[0], max_tokens=3))).status_code == 200
