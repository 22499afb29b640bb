"""The engine in its own process: what goes in, what comes out, and what happens when one side dies."""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from engine import client as client_module
from engine import process
from engine.client import EngineClient
from engine.config import EngineConfig
from engine.errors import (
    EngineBrokenError,
    EngineDeadError,
    EngineStartError,
    EngineStoppedError,
    OverloadedError,
    RequestError,
)
from engine.loop import Engine
from engine.messages import AbortRequest, AddRequest, RequestOutput, StepStats, ToEngine
from engine.scheduling.batch import Batch, CommittedTokens
from tests.engine.helpers import params

PROMPT = [5, 6, 7, 8, 9]


def config_for(model_dir: Path, **settings: Any) -> EngineConfig:
    sizes = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "kv_cache_memory": 4 << 20, "block_size": 4}
    return EngineConfig(model_dir=str(model_dir), dtype="float32", device="cpu", **{**sizes, **settings})


@contextlib.asynccontextmanager
async def running(
    config: EngineConfig, on_step: Callable[[StepStats], None] | None = None
) -> AsyncIterator[EngineClient]:
    client = EngineClient(config, on_step)
    await client.start()
    try:
        yield client
    finally:
        await client.stop()


async def collect(
    client: EngineClient, name: str = "r", prompt: list[int] = PROMPT, **sampling: Any
) -> list[RequestOutput]:
    return [output async for output in client.generate(name, prompt, params(**sampling))]


async def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def tokens_of(outputs: list[RequestOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


async def test_requests_are_answered_side_by_side_and_then_the_process_ends(tiny_model_dir: Path) -> None:
    steps: list[StepStats] = []
    async with running(config_for(tiny_model_dir), steps.append) as client:
        info = client.info
        assert (info.vocab_size, info.max_model_len, info.block_size) == (128, 256, 4)
        assert (info.dtype, info.device, info.heads, info.max_tree_nodes) == ("float32", "cpu", None, 1)
        assert client.is_healthy()
        pid = client.process_id
        assert pid is not None and is_alive(pid)

        alone = await collect(client, max_tokens=20, ignore_eos=True)
        many = await asyncio.gather(
            *(collect(client, f"r{i}", max_tokens=20, ignore_eos=True) for i in range(6))
        )
        assert len(tokens_of(alone)) == 20
        assert [tokens_of(outputs) for outputs in many] == [tokens_of(alone)] * 6
        assert [output.finish_reason for output in alone] == [None] * 19 + ["length"]
        assert client.num_in_flight() == 0
        assert max(len(step.committed_tokens) for step in steps) == 4
        assert steps[-1].num_running == 0 and steps[-1].kv_usage == 0.0
    assert not is_alive(pid)
    assert not client.is_healthy()


async def test_sampling_parameters_arrive(tiny_model_dir: Path) -> None:
    async with running(config_for(tiny_model_dir)) as client:
        sampling = {"max_tokens": 12, "temperature": 1.0, "seed": 2**63 + 5, "ignore_eos": True}
        first = await collect(client, **sampling, logprobs=2)
        assert tokens_of(await collect(client, **sampling)) == tokens_of(first)
        assert all(len(entry.top) == 2 for output in first for entry in output.logprobs or [])
        biased = await collect(client, logit_bias={9: 100.0}, max_tokens=3, stop_token_ids=(9,))
        assert (tokens_of(biased), biased[-1].stop_token_id) == ([9], 9)


class FailingRunner:
    """The engine's own runner, but a pass with one of these requests in it fails."""

    def __init__(self, engine: Engine, culprits: set[str]) -> None:
        self._execute = engine._runner.execute
        self._culprits = culprits

    def execute(self, batch: Batch) -> list[CommittedTokens]:
        committed = self._execute(batch)  # fails late: all of the pass has been written
        if self._culprits & {scheduled.request.request_id for scheduled in batch.scheduled}:
            raise RuntimeError("this request is cursed")
        return committed


def run_with_culprits(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, names: str, culprits: str
) -> dict[str, list[RequestOutput]]:
    monkeypatch.setattr(engine, "_runner", FailingRunner(engine, set(culprits)))
    outputs: dict[str, list[RequestOutput]] = {name: [] for name in names}
    for name in names:
        engine.add_request(AddRequest(name, [*PROMPT, ord(name)], params(20, ignore_eos=True)))
    while engine.has_work():
        for output in engine.step().outputs:
            outputs[output.request_id].append(output)
    engine.scheduler.check_integrity()
    return outputs


def test_request_that_breaks_takes_down_only_itself(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        expected = run_with_culprits(Engine(config_for(tiny_model_dir)), patch, "abcdef", "")
    engine = Engine(config_for(tiny_model_dir))
    for _ in range(2):  # the lost request leaves nothing behind
        with monkeypatch.context() as patch:
            outputs = run_with_culprits(engine, patch, "abcdef", "c")
        for name in "abdef":
            assert tokens_of(outputs[name]) == tokens_of(expected[name])
            assert outputs[name][-1].finish_reason == "length"
        assert [(o.token_ids, o.finish_reason) for o in outputs["c"]] == [([], "abort")]
    assert engine.scheduler.kv_usage == 0.0


def test_engine_that_fails_every_request_gives_up(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(config_for(tiny_model_dir))
    for name in "abcd":  # one lost request at a time, with a good one in between, is no broken engine
        with monkeypatch.context() as patch:
            run_with_culprits(engine, patch, name, name)
            run_with_culprits(engine, patch, "z", "")
    with pytest.raises(EngineBrokenError):
        run_with_culprits(engine, monkeypatch, "abcdefghijklm", "abcdefghijklm")


def test_abort_takes_effect_before_the_next_step(tiny_model_dir: Path) -> None:
    engine = Engine(config_for(tiny_model_dir))
    inbox: queue.SimpleQueue[ToEngine] = queue.SimpleQueue()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for name in ("a", "b"):
            inbox.put(AddRequest(name, [*PROMPT, ord(name)], params(50, ignore_eos=True)))
        process._take_messages(engine, theirs, inbox)
        before = engine.step().stats
        inbox.put(AbortRequest("a"))
        process._take_messages(engine, theirs, inbox)
        step = engine.step()
    assert (before.num_running, step.stats.num_running) == (2, 1)
    assert step.stats.kv_usage < before.kv_usage
    assert [output.request_id for output in step.outputs] == ["b"]


async def test_closing_the_stream_frees_its_blocks(tiny_model_dir: Path) -> None:
    steps: list[StepStats] = []
    async with running(config_for(tiny_model_dir), steps.append) as client:
        other = asyncio.create_task(collect(client, "other", max_tokens=240, ignore_eos=True))
        stream = client.generate("closed", [*PROMPT, 10], params(240, ignore_eos=True))
        await anext(stream)
        await until(lambda: steps[-1].num_running == 2)
        await stream.aclose()
        assert client.num_in_flight() == 1
        await until(lambda: steps[-1].num_running == 1)
        assert not other.done()
        other.cancel()
        await asyncio.gather(other, return_exceptions=True)
        assert client.num_in_flight() == 0
        # Cancelled too: nothing runs, and the next request has the cache for itself.
        await collect(client, "last", max_tokens=2)
        assert steps[-1].num_running == 0 and steps[-1].kv_usage == 0.0


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
        if not client.is_healthy():
            with pytest.raises(EngineDeadError, match="restarting"):
                await collect(client)
        await until(client.is_healthy, 60.0)
        assert client.num_restarts == 1
        assert client.process_id != pid
        assert len(tokens_of(await collect(client, max_tokens=5, ignore_eos=True))) == 5


async def test_engine_that_cannot_load_says_why(tmp_path: Path, tiny_model_dir: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["UnheardOfForCausalLM"], "model_type": "odd"}')
    with pytest.raises(EngineStartError, match="UnheardOf"):
        await EngineClient(config_for(tmp_path)).start()
    with pytest.raises(EngineStartError, match=r"--kv-cache-memory: .*--max-model-len"):
        await EngineClient(config_for(tiny_model_dir, kv_cache_memory=1 << 16)).start()
    with pytest.raises(EngineStartError, match="no head set"):
        await EngineClient(config_for(tiny_model_dir, heads_dir=str(tmp_path / "nothing"))).start()


async def test_info_before_the_start_is_an_error(tiny_model_dir: Path) -> None:
    with pytest.raises(EngineStartError):
        _ = EngineClient(config_for(tiny_model_dir)).info


async def test_impossible_requests_are_refused_and_the_neighbours_unharmed(tiny_model_dir: Path) -> None:
    async with running(config_for(tiny_model_dir)) as client:
        neighbour = asyncio.create_task(collect(client, "n", max_tokens=100, ignore_eos=True))
        cases: list[tuple[str, list[int], dict[str, Any]]] = [
            ("prompt", [], {}),
            ("prompt", [1] * 256, {}),
            ("prompt", [1, 128], {}),
            ("prompt", [1, -1], {}),
            ("max_tokens", PROMPT, {"max_tokens": 0}),
            ("logit_bias", PROMPT, {"logit_bias": {128: 1.0}}),
            ("stop_token_ids", PROMPT, {"stop_token_ids": (999,)}),
            ("logprobs", PROMPT, {"logprobs": 129}),
        ]
        for index, (parameter, prompt, sampling) in enumerate(cases):
            with pytest.raises(RequestError) as caught:
                await collect(client, f"r{index}", prompt, **sampling)
            assert caught.value.parameter == parameter
        assert len(tokens_of(await neighbour)) == 100
        assert client.num_in_flight() == 0
        longest = await collect(client, "longest", [1] * 255, max_tokens=1000, ignore_eos=True)
        assert (len(tokens_of(longest)), longest[-1].finish_reason) == (1, "length")


async def test_request_beyond_the_queue_is_turned_away_at_once(tiny_model_dir: Path) -> None:
    async with running(config_for(tiny_model_dir, max_num_seqs=1)) as client:
        streams = [client.generate(str(i), PROMPT, params(200, ignore_eos=True)) for i in range(16)]
        waiting = [asyncio.create_task(anext(stream)) for stream in streams]
        await until(lambda: client.num_in_flight() == 16)
        with pytest.raises(OverloadedError) as caught:
            await collect(client, "one too many")
        assert caught.value.retry_after > 0
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        for stream in streams:
            await stream.aclose()
        assert len(tokens_of(await collect(client, max_tokens=3, ignore_eos=True))) == 3


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
        assert client._supervisor is not None and client._process is not None and client._writer is not None
        client._supervisor.cancel()  # as if there were nobody to clean up
        client._writer.transport.abort()
        assert await asyncio.wait_for(client._process.wait(), 10.0) == 0


async def test_client_that_does_not_read_leaves_the_server_healthy(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(config_for(tiny_model_dir)) as client:
        stream = client.generate("slow", PROMPT, params(20, ignore_eos=True))
        first = await anext(stream)
        await until(lambda: not client._working)
        monkeypatch.setattr(client_module, "_STALL_SECONDS", 0.01)
        await asyncio.sleep(1.2)
        assert client.num_in_flight() == 1
        assert client.is_healthy()
        assert len(first.token_ids) + len(tokens_of([output async for output in stream])) == 20


async def test_engine_that_hangs_is_unhealthy_and_then_replaced(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(config_for(tiny_model_dir)) as client:
        stream = client.generate("a", PROMPT, params(240, ignore_eos=True))
        await anext(stream)
        monkeypatch.setattr(client_module, "_STALL_SECONDS", 0.5)
        assert client.process_id is not None
        os.kill(client.process_id, signal.SIGSTOP)
        await until(lambda: not client.is_healthy())
        assert client.num_restarts == 0
        monkeypatch.setattr(client_module, "_KILL_SECONDS", 0.5)
        with pytest.raises(EngineDeadError, match="restarted"):
            async for _ in stream:
                pass
        monkeypatch.undo()
        await until(client.is_healthy, 60.0)
        assert len(tokens_of(await collect(client, max_tokens=5, ignore_eos=True))) == 5


async def test_restart_goes_on_when_the_machine_has_nothing_left(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = iter([OSError("Too many open files"), MemoryError()])
    connect = EngineClient._connect

    async def failing(self: EngineClient) -> asyncio.StreamReader:
        if (failure := next(failures, None)) is not None:
            raise failure
        return await connect(self)

    monkeypatch.setattr(client_module, "_RESTART_SECONDS", (0.0,))
    async with running(config_for(tiny_model_dir)) as client:
        monkeypatch.setattr(EngineClient, "_connect", failing)
        assert client.process_id is not None
        os.kill(client.process_id, signal.SIGKILL)
        await until(lambda: client.num_restarts == 3 and client.is_healthy(), 60.0)
        assert len(tokens_of(await collect(client, max_tokens=5, ignore_eos=True))) == 5


async def test_process_that_cannot_be_started_is_a_clear_error(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def failing(self: EngineClient) -> asyncio.StreamReader:
        raise OSError("Too many open files")

    monkeypatch.setattr(EngineClient, "_connect", failing)
    with pytest.raises(EngineStartError, match="Too many open files"):
        await EngineClient(config_for(tiny_model_dir)).start()


async def test_engine_is_replaced_when_its_messages_cannot_be_taken_in(tiny_model_dir: Path) -> None:
    broken = True

    def on_step(stats: StepStats) -> None:
        nonlocal broken
        if broken:
            broken = False
            raise ValueError("a number nobody expected")

    async with running(config_for(tiny_model_dir), on_step) as client:
        with pytest.raises(EngineDeadError, match="died"):
            await collect(client, max_tokens=50, ignore_eos=True)
        await until(client.is_healthy, 60.0)
        assert len(tokens_of(await collect(client, max_tokens=5, ignore_eos=True))) == 5


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
        for number in (signal.SIGTERM, signal.SIGINT):
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
        assert pid is not None and client._writer is not None
        os.kill(pid, signal.SIGSTOP)
        await until(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("T"))
        client._writer.close()
        await until(lambda: client._writer is None)  # the supervisor waits for the end of the process
        asyncio.get_running_loop().call_later(0.5, os.kill, pid, signal.SIGCONT)
    assert not is_alive(pid)
