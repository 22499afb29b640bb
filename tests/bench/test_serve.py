"""`gorgon bench serve` measures every level on a live server and says what it cannot do before it starts."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from bench.peers.process import ServerProcess, free_port
from bench.stream import Ask, BenchError
from bench.synthetic import synthetic_prompts
from cli.main import main
from engine.errors import ConfigError
from tests.bench.servers import FakeServer, sse, text, usage


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    port = free_port()
    command = [sys.executable, "-m", "tests.bench.servers", str(port)]
    server = ServerProcess(command, port, {}, tmp_path / "log")
    try:
        server.wait_ready(None, limit=60)
        yield server.url
    finally:
        server.close()


def test_levels_of_concurrency(url: str, capsys: Any) -> None:
    argv = ["bench", "serve", "--url", url, "--concurrency", "1", "3", "--num-requests", "30"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    document = json.loads(out.splitlines()[-1])
    assert out.startswith("concurrency")
    assert [level["concurrency"] for level in document["levels"]] == [1, 3]
    assert [level["requests"] for level in document["levels"]] == [30, 30]  # more than there are prompts
    assert document["model"] == "fake"


def test_rates_and_made_up_prompts(url: str, capsys: Any) -> None:
    argv = ["bench", "serve", "--url", url, "--rate", "200", "--num-requests", "8"]
    assert main([*argv, "--input-len", "50", "--output-len", "2"]) == 0
    out = capsys.readouterr().out
    document = json.loads(out.splitlines()[-1])
    [level] = document["levels"]
    assert out.startswith("rate") and level["rate"] == 200
    assert level["prompt_tokens"] == 8 * 50
    assert (document["prompts"], document["max_tokens"], document["ignore_eos"]) == ("synthetic:50", 2, True)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--rate", "0"], "--rate: must be more than 0"),
        (["--input-len", "5", "--prompts", "x"], "--input-len: makes prompts up; leave out --prompts"),
        (["--output-len", "0"], "--output-len: must be at least 1"),
    ],
)
def test_what_cannot_be_done_is_said_first(argv: list[str], message: str, capsys: Any) -> None:
    assert main(["bench", "serve", *argv]) == 2
    assert message in capsys.readouterr().err


def test_nobody_there_is_one_line(capsys: Any) -> None:
    assert main(["bench", "serve", "--url", f"http://127.0.0.1:{free_port()}"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("gorgon: error: http://127.0.0.1") and error.count("\n") == 1


def test_a_rate_and_a_level_exclude_each_other() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cli.main", "bench", "serve", "--rate", "1", "--concurrency", "2"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and "not allowed with" in done.stderr


class Counting(FakeServer):
    """Takes 1.5 tokens a word and 20 for its template."""

    def answer(self, request: dict[str, Any]) -> httpx.Response:
        words = len(request["messages"][0]["content"].split())
        return httpx.Response(200, text=sse(text("a"), usage(1, prompt_tokens=20 + words * 3 // 2)))


async def test_made_up_prompts_are_as_long_as_asked_and_all_different() -> None:
    server = Counting("")
    ask = Ask(model="m", max_tokens=7, ignore_eos=True)
    async with server.client() as client:
        prompts = await synthetic_prompts(client, ask, 500, count=5, seed=3)
        again = await synthetic_prompts(client, ask, 500, count=5, seed=3)
    assert all(abs(20 + len(prompt.text.split()) * 1.5 - 500) <= 5 for prompt in prompts)
    assert len({prompt.text[:40] for prompt in prompts}) == 5
    assert prompts == again
    assert all(r["max_tokens"] == 1 and "ignore_eos" not in r for r in server.requests)


async def test_made_up_prompts_need_a_server_that_counts() -> None:
    ask = Ask(model="m", max_tokens=1)
    async with FakeServer(sse(text("a"))).client() as client:
        with pytest.raises(BenchError, match="--prompts"):
            await synthetic_prompts(client, ask, 50, count=1, seed=0)
    async with Counting("").client() as client:
        with pytest.raises(ConfigError, match="--input-len: must be more than"):
            await synthetic_prompts(client, ask, 10, count=1, seed=0)
