"""The server as a process: its banner, its signals, and starts that fail."""

from __future__ import annotations

import asyncio
import re
import shlex
import signal
import socket
import sys
from asyncio.subprocess import PIPE, Process
from pathlib import Path

import httpx
import msgspec
import pytest

from engine.config import EngineConfig
from server.run import banner, describe, serve
from server.settings import ServerSettings
from tests.fake_engine import model_info
from tests.server.support import CHAT, ROUTES, body_for


def test_the_start_up_line_says_what_the_cache_is() -> None:
    assert describe(model_info()).endswith("KV cache of 1024 tokens")
    info = msgspec.structs.replace(model_info(), kv_cache_dtype="float8_e4m3fn")
    assert describe(info).endswith("KV cache of 1024 tokens in float8_e4m3fn")


class Running:
    """A fake server in a process of its own."""

    def __init__(self, process: Process, url: str) -> None:
        self.process = process
        self.url = url

    @classmethod
    async def start(cls, grace: float = 10.0, step: float = 0.05) -> Running:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.server.fake_server", str(grace), str(step), stdout=PIPE
        )
        assert process.stdout is not None
        await process.stdout.readline()
        line = (await process.stdout.readline()).decode()
        match = re.search(r"http://127\.0\.0\.1:\d+", line)
        assert match is not None, line
        return cls(process, match[0])

    async def end(self) -> tuple[int, str]:
        """Exit status and what was printed after the banner."""
        out, _ = await asyncio.wait_for(self.process.communicate(), 20)
        assert self.process.returncode is not None
        return self.process.returncode, out.decode()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
async def test_an_idle_server_ends_at_once(number: signal.Signals) -> None:
    running = await Running.start(grace=60)
    async with httpx.AsyncClient(base_url=running.url) as client:
        assert (await client.get("/health")).status_code == 200  # leaves its connection open
        running.process.send_signal(number)
        assert await running.end() == (0, "aborted 0\n")  # long before the grace period does


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
async def test_a_signal_lets_running_requests_finish_and_refuses_new_ones(number: signal.Signals) -> None:
    running = await Running.start()
    async with httpx.AsyncClient(base_url=running.url) as client:
        whole = asyncio.ensure_future(client.post(CHAT, json=body_for(CHAT)))
        streamed = asyncio.ensure_future(client.post(CHAT, json=body_for(CHAT, stream=True)))
        await asyncio.sleep(0.3)
        running.process.send_signal(number)
        await asyncio.sleep(0.1)
        for route in ROUTES:
            refused = await client.post(route, json=body_for(route))
            assert refused.status_code == 503
            assert refused.headers["retry-after"]
            assert refused.json()["error"]["code"] == "stopping"
        health = await client.get("/health")
        assert (health.status_code, health.json()) == (503, {"status": "stopping"})
        assert (await whole).json()["choices"][0]["message"]["content"] == "x" * 20
        assert (await streamed).text.endswith("data: [DONE]\n\n")
    assert await running.end() == (0, "aborted 0\n")


async def test_the_grace_period_ends_what_does_not() -> None:
    running = await Running.start(grace=0.5, step=5.0)
    async with httpx.AsyncClient(base_url=running.url) as client:
        requests = [asyncio.ensure_future(client.post(route, json=body_for(route))) for route in ROUTES]
        await asyncio.sleep(0.3)
        running.process.send_signal(signal.SIGTERM)
        assert await running.end() == (0, "aborted 2\n")  # the requests alone would take 100 s
        for request in requests:
            assert (await request).json()["error"]["code"] == "stopping"


async def test_a_second_signal_ends_it_at_once() -> None:
    running = await Running.start(grace=60, step=5.0)
    async with httpx.AsyncClient(base_url=running.url) as client:
        request = asyncio.ensure_future(client.post(CHAT, json=body_for(CHAT)))
        await asyncio.sleep(0.3)
        running.process.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.2)
        running.process.send_signal(signal.SIGINT)
        status, _ = await running.end()  # long before the grace period does
        assert status != 0
        await asyncio.gather(request, return_exceptions=True)


def test_the_banner_is_a_request_to_paste() -> None:
    name = "it's a model"
    settings = ServerSettings(served_model_name=name, host="0.0.0.0", api_key="k")
    curl = shlex.split(banner(settings, 8000).splitlines()[-1])
    assert curl[:2] == ["curl", "http://127.0.0.1:8000/v1/chat/completions"]
    assert name in curl[-1]
    assert "Authorization: Bearer $GORGON_API_KEY" in curl
    several = ServerSettings(served_model_name="m", api_key="k,l")
    assert "Authorization: Bearer ${GORGON_API_KEY%%,*}" in shlex.split(
        banner(several, 8000).splitlines()[-1]
    )
    assert "[::1]:80/" in banner(ServerSettings(served_model_name="m", host="::"), 80)


def test_a_port_in_use_is_told_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status = serve(ServerSettings(served_model_name="m", port=port), EngineConfig(model_dir="none"))
    assert status == 1
    assert re.match(
        rf"gorgon: error: cannot listen on 127\.0\.0\.1 port {port}: .*--port\n", capsys.readouterr().err
    )


@pytest.mark.parametrize("host", ["x" * 64, "no.such.host.invalid", "a..b"])
def test_a_host_that_is_none_is_told_in_a_line(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ServerSettings(served_model_name="m", host=host, port=0)
    assert serve(settings, EngineConfig(model_dir="none")) == 1
    assert re.match(rf"gorgon: error: cannot listen on {host} port 0: .*--port\n", capsys.readouterr().err)


def test_a_model_that_cannot_be_read_is_told_in_a_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = ServerSettings(served_model_name="m", port=0)
    assert serve(settings, EngineConfig(model_dir=str(tmp_path))) == 1
    err = capfd.readouterr().err
    assert "gorgon: error: " in err
    assert "Traceback" not in err
