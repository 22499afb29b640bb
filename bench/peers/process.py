"""A server in a session of its own: started, waited for, paused while others are measured, ended."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import httpx

from bench.peers.environment import PeerError, last_lines

HOST = "127.0.0.1"
START_LIMIT = 1200.0  # seconds; vLLM compiles when it starts for the first time
STOP_LIMIT = 20.0
POLL = 0.1
ANSWER_LIMIT = 120.0  # seconds for the first answer of one token


def _inherited() -> dict[str, str]:
    """Our variables without OMP_NUM_THREADS, which some servers obey and others do not."""
    return {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


class ServerProcess:
    """One server on the loopback interface. `close` ends it and all that it has started."""

    def __init__(self, command: Sequence[str], port: int, environ: Mapping[str, str], log: Path) -> None:
        self.url = f"http://{HOST}:{port}"
        self.log = log
        self.start_seconds = 0.0
        self._closed = False
        self._started = time.perf_counter()
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**_inherited(), **environ},
                start_new_session=True,  # so that its children are found, and Ctrl-C reaches us alone
            )

    def wait_ready(self, model: str | None, limit: float = START_LIMIT) -> str:
        """Waits for a first answered token, which ends the start-up; returns the name of the served model.

        Raises PeerError where the server ends before, or takes longer than `limit` seconds.
        """
        deadline = self._started + limit
        with httpx.Client(base_url=self.url, timeout=ANSWER_LIMIT, trust_env=False) as client:
            while True:
                self.check_alive()
                with contextlib.suppress(httpx.TransportError):
                    name = model or _listed_model(client)
                    if name is not None and _answers(client, name):
                        self.start_seconds = time.perf_counter() - self._started
                        return name
                if time.perf_counter() > deadline:
                    raise PeerError(
                        f"gave no answer within {limit:.0f} s: {last_lines(self.log)}; see {self.log}"
                    )
                time.sleep(POLL)

    def check_alive(self) -> None:
        """Raises PeerError if the server has ended."""
        if (status := self._process.poll()) is not None:
            raise PeerError(f"ended with status {status}: {last_lines(self.log)}; see {self.log}")

    def pause(self) -> None:
        """Stop using the processor, so that another server has it all."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def resident_bytes(self) -> int | None:
        """Resident memory of all its processes. Shared pages count once. None on systems other than Linux."""
        sizes = [size for pid in self._pids() if (size := _proportional_bytes(pid)) is not None]
        return sum(sizes) if sizes else None

    def close(self) -> None:
        """End it; a second time does nothing, because its process id may be another's by then."""
        if self._closed:
            return
        self._closed = True
        self.resume()
        if self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_LIMIT)
        self._signal(signal.SIGKILL)  # what is left of its session
        self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        for pid in self._pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def _pids(self) -> list[int]:
        """Processes of the server's session; on systems other than Linux the server alone."""
        if not Path("/proc/self").exists():
            return [self._process.pid] if self._process.poll() is None else []
        pids = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if os.getsid(int(entry.name)) == self._process.pid:
                    pids.append(int(entry.name))
        return pids


def _proportional_bytes(pid: int) -> int | None:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return None


def _listed_model(client: httpx.Client) -> str | None:
    response = client.get("/v1/models")
    models = response.json().get("data") if response.is_success else None
    return str(models[0]["id"]) if models else None


def _answers(client: httpx.Client, model: str) -> bool:
    """Whether a chat request for one token is answered."""
    body = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
    return client.post("/v1/chat/completions", json={**body, "temperature": 0}).is_success
