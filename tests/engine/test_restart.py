"""What an engine's requests, and those that come meanwhile, see of its hangs and its way back. With processes
and signals, and without a model."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import pytest

from engine import child as child_module
from engine import client as client_module
from engine import watchdog as watchdog_module
from engine.child import EngineProcess
from engine.client import EngineClient
from engine.errors import EngineDeadError, EngineStartError, EngineStoppedError, OverloadedError
from engine.messages import StepStats
from tests.engine.helpers import params
from tests.engine.processes import collect, config_for, is_alive, running, tokens_of, until
from tests.engine.puppet import DIES, HANGS, SPINS

pytestmark = pytest.mark.usefixtures("puppets")


@pytest.fixture
def puppets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines of `tests.engine.puppet`, looked at often."""
    monkeypatch.setattr(child_module, "_MODULE", "tests.engine.puppet")
    monkeypatch.setattr(client_module, "_CHECK_SECONDS", 0.02)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))


def plan(folder: Path, *starts: str) -> None:
    """What the next starts do, one after the other."""
    (folder / "starts").write_text("\n".join(starts))


def pids(folder: Path) -> list[int]:
    return [int(line) for line in (folder / "pids").read_text().split()]


def kill(client: EngineClient, number: signal.Signals = signal.SIGKILL) -> None:
    assert client.process_id is not None
    os.kill(client.process_id, number)


@pytest.mark.parametrize("fault", ["hang", "stop"])
async def test_a_restart_that_hangs_while_loading_is_killed_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    async with running(config_for(tmp_path)) as client:
        monkeypatch.setattr(watchdog_module, "_LEAST_START", 1.0)
        monkeypatch.setattr(watchdog_module, "_STARTS", 0.0)
        plan(tmp_path, fault)
        kill(client)
        await until(lambda: not client.is_healthy())
        assert len(tokens_of(await collect(client, max_tokens=3))) == 3
        assert client.num_restarts == 2
        hung = pids(tmp_path)[1]
        assert not is_alive(hung)


async def test_a_first_start_that_hangs_is_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog_module, "_FIRST_START", 1.0)
    plan(tmp_path, "hang")
    client = EngineClient(config_for(tmp_path))
    with pytest.raises(EngineStartError, match="did not load its model within 1 s"):
        await client.start()
    assert client.process_id is None
    await client.stop()


@pytest.mark.parametrize("fault", ["stopped", "hangs", "spins"])
async def test_a_hang_of_a_running_engine_is_found_and_it_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    timeout = 1.0 if fault == "stopped" else None
    monkeypatch.setattr(watchdog_module, "_MOST_STEP", 0.5)
    async with running(config_for(tmp_path, watchdog_timeout=timeout)) as client:
        hung = client.process_id
        stream = client.generate("neighbour", [1], params(10_000))
        await anext(stream)
        began = time.monotonic()
        if fault == "stopped":
            kill(client, signal.SIGSTOP)
        else:
            prompt = [HANGS if fault == "hangs" else SPINS]
            culprit = asyncio.create_task(collect(client, "culprit", prompt))
        with pytest.raises(EngineDeadError, match="died"):
            async for _ in stream:
                pass
        assert 0.4 < time.monotonic() - began < 20.0
        if fault != "stopped":
            with pytest.raises(EngineDeadError):
                await culprit
        assert not client.is_healthy()
        assert len(tokens_of(await collect(client, max_tokens=3))) == 3
        assert client.is_healthy()
        assert hung is not None and not is_alive(hung)


async def test_requests_that_come_while_the_engine_is_away_wait_for_it(tmp_path: Path) -> None:
    async with running(config_for(tmp_path)) as client:
        plan(tmp_path, "after 0.3")
        kill(client)
        await until(lambda: not client.is_healthy())
        answers = [asyncio.create_task(collect(client, str(i), max_tokens=5)) for i in range(20)]
        left = asyncio.create_task(collect(client, "left", max_tokens=5))
        await until(lambda: client.num_waiting() == 21)
        left.cancel()
        await asyncio.gather(left, return_exceptions=True)
        assert (client.num_waiting(), client.num_in_flight()) == (20, 20)
        assert not client.is_healthy()
        for answer in await asyncio.gather(*answers):
            assert len(tokens_of(answer)) == 5
        assert (client.num_restarts, client.num_waiting(), client.num_in_flight()) == (1, 0, 0)


async def test_waiting_for_the_engine_ends_after_a_while_and_at_a_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(config_for(tmp_path)) as client:
        monkeypatch.setattr(client_module, "_WAIT_SECONDS", 0.3)
        monkeypatch.setattr(client_module, "_QUEUE_FACTOR", 1)
        plan(tmp_path, "hang")
        kill(client)
        await until(lambda: not client.is_healthy())
        waiting = [asyncio.create_task(collect(client, str(i))) for i in range(client.info.max_num_seqs)]
        await until(lambda: client.num_waiting() == len(waiting))
        with pytest.raises(OverloadedError):
            await collect(client, "one too many")
        for answer in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(answer, EngineDeadError) and "restarting" in str(answer)
        assert client.num_in_flight() == 0


async def test_a_request_that_kills_its_engine_is_not_given_to_the_next(tmp_path: Path) -> None:
    async with running(config_for(tmp_path)) as client:
        neighbour = asyncio.create_task(collect(client, "neighbour", max_tokens=10_000))
        await until(lambda: client.num_in_flight() == 1)
        with pytest.raises(EngineDeadError, match="died"):
            await collect(client, "culprit", [DIES])
        with pytest.raises(EngineDeadError, match="died"):
            await neighbour
        assert len(tokens_of(await collect(client, max_tokens=50))) == 50
        assert client.num_restarts == 1


async def test_a_request_that_waited_is_not_lost_with_the_engine_that_it_never_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "_RESTART_SECONDS", (0.0,))
    async with running(config_for(tmp_path)) as client:
        plan(tmp_path, "after 0.2", "after 0.2")
        kill(client)
        await until(lambda: not client.is_healthy())
        answer = asyncio.create_task(collect(client, max_tokens=5))
        await until(lambda: len(pids(tmp_path)) == 2)
        os.kill(pids(tmp_path)[1], signal.SIGKILL)  # while it loads
        assert len(tokens_of(await answer)) == 5
        assert client.num_restarts == 2


@pytest.mark.parametrize("up", [True, False], ids=["in the engine", "waiting for it"])
async def test_cut_off_tells_every_request_and_takes_no_more(tmp_path: Path, up: bool) -> None:
    async with running(config_for(tmp_path)) as client:
        if not up:
            plan(tmp_path, "hang")
            kill(client)
            await until(lambda: not client.is_healthy())
        answer = asyncio.create_task(collect(client, max_tokens=10_000))
        await until(lambda: client.num_in_flight() == 1)
        await asyncio.sleep(0.05)
        client.cut_off()
        with pytest.raises(EngineStoppedError):
            await answer
        with pytest.raises(EngineStoppedError):
            await collect(client)
        assert client.num_in_flight() == 0 and not client.is_healthy()


async def test_stopping_during_a_start_takes_no_time(tmp_path: Path) -> None:
    plan(tmp_path, "stop")
    client = EngineClient(config_for(tmp_path))
    starting = asyncio.create_task(client.start())
    await until(lambda: (tmp_path / "pids").exists() and bool(pids(tmp_path)))
    began = time.monotonic()
    starting.cancel()
    await asyncio.gather(starting, return_exceptions=True)
    await client.stop()
    assert time.monotonic() - began < 4.0
    assert not is_alive(pids(tmp_path)[0])


async def test_restart_goes_on_when_the_machine_has_nothing_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = iter([OSError("Too many open files"), MemoryError()])
    start = EngineProcess.start

    async def failing() -> EngineProcess:
        if (failure := next(failures, None)) is not None:
            raise failure
        return await start()

    monkeypatch.setattr(client_module, "_RESTART_SECONDS", (0.0,))
    async with running(config_for(tmp_path)) as client:
        monkeypatch.setattr(EngineProcess, "start", failing)
        kill(client)
        await until(lambda: client.num_restarts == 3 and client.is_healthy(), 60.0)
        assert len(tokens_of(await collect(client, max_tokens=5))) == 5


async def test_engine_is_replaced_when_its_messages_cannot_be_taken_in(tmp_path: Path) -> None:
    broken = True

    def on_step(stats: StepStats) -> None:
        nonlocal broken
        if broken:
            broken = False
            raise ValueError("a number nobody expected")

    async with running(config_for(tmp_path), on_step) as client:
        with pytest.raises(EngineDeadError, match="died"):
            await collect(client, max_tokens=50)
        await until(client.is_healthy, 60.0)
        assert len(tokens_of(await collect(client, max_tokens=5))) == 5


async def test_an_engine_whose_captures_fail_starts_again_without_graphs_and_stays_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan(tmp_path, "capture", "capture", "capture")  # without graphs it starts whatever it is told
    async with running(config_for(tmp_path)) as client:
        assert len(tokens_of(await collect(client, max_tokens=3))) == 3
        assert (client.num_capture_failures, client.num_restarts, len(pids(tmp_path))) == (1, 0, 2)
        assert "without CUDA graphs, slower. stream is capturing" in caplog.text
        kill(client)
        await until(lambda: not client.is_healthy())
        assert len(tokens_of(await collect(client, max_tokens=3))) == 3
        assert (client.num_capture_failures, client.num_restarts, len(pids(tmp_path))) == (1, 1, 3)
