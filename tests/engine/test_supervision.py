"""What happens when the engine process dies, hangs or is ended, and when it must not be."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import msgspec
import pytest

from engine import client as client_module
from engine import watchdog as watchdog_module
from engine.child import EngineProcess
from engine.client import EngineClient
from engine.errors import EngineDeadError, EngineStartError, EngineStoppedError
from tests.engine.helpers import params
from tests.engine.processes import PROMPT, collect, config_for, is_alive, running, tokens_of, until
from tests.fake_engine import model_info


async def test_killed_engine_fails_its_requests_and_is_restarted(tiny_model_dir: Path) -> None:
    async with running(config_for(tiny_model_dir)) as client:
        streams = [client.generate(name, PROMPT, params(240, ignore_eos=True)) for name in ("a", "b")]
        for stream in streams:
            await anext(stream)
        pid = client.process_id
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        for stream in streams:
            with pytest.raises(EngineDeadError, match="died"):
                async for _ in stream:
                    pass
        assert client.num_in_flight() == 0
        assert len(tokens_of(await collect(client, max_tokens=5, ignore_eos=True))) == 5
        assert client.is_healthy()
        assert client.num_restarts == 1
        assert client.process_id != pid


async def test_stopping_fails_what_still_runs(tiny_model_dir: Path) -> None:
    async with running(config_for(tiny_model_dir)) as client:
        stream = client.generate("a", PROMPT, params(240, ignore_eos=True))
        await anext(stream)
        await client.stop()
        with pytest.raises(EngineStoppedError):
            async for _ in stream:
                pass
        with pytest.raises(EngineStoppedError):
            await collect(client)


async def test_engine_ends_by_itself_when_the_server_vanishes(tiny_model_dir: Path) -> None:
    async with running(config_for(tiny_model_dir)) as client:
        await anext(client.generate("a", PROMPT, params(240, ignore_eos=True)))
        assert client._supervisor is not None and client._child is not None
        client._supervisor.cancel()  # as if there were nobody to clean up
        client._child._writer.transport.abort()
        assert await asyncio.wait_for(client._child._process.wait(), 10.0) == 0


async def test_client_that_does_not_read_leaves_the_server_healthy(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(config_for(tiny_model_dir)) as client:
        stream = client.generate("slow", PROMPT, params(20, ignore_eos=True))
        first = await anext(stream)
        await until(lambda: not client._working)
        monkeypatch.setattr(client_module, "_CHECK_SECONDS", 0.01)
        monkeypatch.setattr(watchdog_module, "_MOST_STEP", 0.1)
        await asyncio.sleep(1.2)
        assert client.num_in_flight() == 1
        assert client.is_healthy()
        assert len(first.token_ids) + len(tokens_of([output async for output in stream])) == 20


async def test_process_that_cannot_be_started_is_a_clear_error(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def failing() -> EngineProcess:
        raise OSError("Too many open files")

    monkeypatch.setattr(EngineProcess, "start", failing)
    with pytest.raises(EngineStartError, match="Too many open files"):
        await EngineClient(config_for(tiny_model_dir)).start()


async def test_signals_to_the_group_leave_the_engine_to_its_requests(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = asyncio.create_subprocess_exec

    async def in_a_group(*command: str, **settings: Any) -> asyncio.subprocess.Process:
        return await create(*command, **settings, process_group=0)

    monkeypatch.setattr(asyncio, "create_subprocess_exec", in_a_group)
    async with running(config_for(tiny_model_dir)) as client:
        stream = client.generate("a", PROMPT, params(200, ignore_eos=True))
        first = await anext(stream)
        pid = client.process_id
        assert pid is not None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.killpg(pid, number)
        assert len(first.token_ids) + len(tokens_of([output async for output in stream])) == 200
        assert client.num_restarts == 0
    assert not is_alive(pid)


async def test_engine_takes_no_modules_from_the_current_directory(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("engine", "torch", "queue"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('poisoned')")
    monkeypatch.chdir(tmp_path)
    async with running(config_for(tiny_model_dir)) as client:
        assert client.is_healthy()


async def test_stop_ends_the_process_that_the_supervisor_was_waiting_for(tiny_model_dir: Path) -> None:
    async with running(config_for(tiny_model_dir)) as client:
        pid = client.process_id
        assert pid is not None and client._child is not None
        os.kill(pid, signal.SIGSTOP)
        await until(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("T"))
        client._child._writer.close()
        await until(lambda: not client.is_healthy())  # the supervisor waits for the end of the process
    assert not is_alive(pid)


def test_a_restarted_engine_that_would_answer_otherwise_is_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    client, info = EngineClient(config_for(tmp_path)), model_info()
    client._take_info(info)
    client._take_info(msgspec.structs.replace(info, num_blocks=63))
    assert not caplog.records
    client._take_info(msgspec.structs.replace(info, quantization="int8"))
    assert "quantization is int8, not none" in caplog.text
