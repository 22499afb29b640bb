"""A server process is waited for, paused, measured and ended with all it has started."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from bench.peers.environment import PeerError
from bench.peers.process import ServerProcess, free_port

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")


@contextmanager
def started(*arguments: str, log: Path) -> Iterator[ServerProcess]:
    port = free_port()
    server = ServerProcess(
        [sys.executable, "-m", "tests.bench.servers", str(port), *arguments], port, {}, log
    )
    try:
        yield server
    finally:
        server.close()


def state(pid: int) -> str:
    """One letter as ps shows it; X for a process that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "X"


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_ready_is_when_a_first_token_is_answered(tmp_path: Path) -> None:
    with started("0.5", log=tmp_path / "log") as server:
        assert server.wait_ready(None, limit=60) == "fake"
        assert 0.5 < server.start_seconds < 60
        assert server.resident_bytes() > 5e6  # an interpreter


def test_a_paused_server_answers_once_it_goes_on(tmp_path: Path) -> None:
    with started(log=tmp_path / "log") as server:
        server.wait_ready(None, limit=60)
        server.pause()
        with pytest.raises(httpx.TimeoutException):
            httpx.get(f"{server.url}/v1/models", timeout=0.3)
        server.resume()
        assert httpx.get(f"{server.url}/v1/models", timeout=30).is_success


def test_closing_ends_children_of_a_paused_server_too(tmp_path: Path) -> None:
    log = tmp_path / "log"
    server = ServerProcess(["sh", "-c", "sleep 600 & echo $!; wait"], 1, {}, log)
    try:
        wait_until(log.read_text)
        child = int(log.read_text())
        server.pause()
        wait_until(lambda: state(child) == "T")
    finally:
        server.close()
    wait_until(lambda: state(child) in "ZX")


def test_a_server_that_ends_is_reported_with_its_last_words(tmp_path: Path) -> None:
    server = ServerProcess(["sh", "-c", "echo no such model; exit 3"], free_port(), {}, tmp_path / "log")
    with pytest.raises(PeerError, match=r"ended with status 3: no such model; see .*log"):
        server.wait_ready(None, limit=30)
    server.close()


def test_a_server_that_never_answers_is_given_up(tmp_path: Path) -> None:
    server = ServerProcess(["sleep", "600"], free_port(), {}, tmp_path / "log")
    with pytest.raises(PeerError, match="no answer within 0 s"):
        server.wait_ready(None, limit=0.3)
    server.close()


def test_variables_of_a_server_are_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("GORGON_SEED", "5")
    script = "echo $PEER_SETTING,$GORGON_SEED,${OMP_NUM_THREADS-all}"
    server = ServerProcess(["sh", "-c", script], 1, {"PEER_SETTING": "on"}, tmp_path / "log")
    with pytest.raises(PeerError, match="on,5,all"):
        server.wait_ready(None, limit=30)
    server.close()
    assert "PEER_SETTING" not in os.environ
