"""The engine in its own process: what goes in, what comes out."""

from __future__ import annotations

import asyncio
import gc
import queue
import socket
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import channel, process
from engine.build import build
from engine.client import EngineClient
from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import EngineStartError, GraphCaptureError, OverloadedError, RequestError
from engine.messages import AbortRequest, AddRequest, EngineFailed, StepStats, ToEngine, ToServer
from tests.engine.helpers import params
from tests.engine.processes import PROMPT, collect, config_for, is_alive, running, tokens_of, until


async def test_requests_are_answered_side_by_side_and_then_the_process_ends(tiny_model_dir: Path) -> None:
    steps: list[StepStats] = []
    async with running(config_for(tiny_model_dir), steps.append) as client:
        info = client.info
        assert (info.vocab_size, info.max_model_len, info.block_size) == (128, 256, 4)
        assert (info.dtype, info.device, info.heads, info.max_tree_nodes) == ("float32", "cpu", None, 64)
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


def test_abort_takes_effect_before_the_next_step(tiny_model_dir: Path) -> None:
    engine = build(config_for(tiny_model_dir))
    inbox: queue.SimpleQueue[ToEngine] = queue.SimpleQueue()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for name in ("a", "b"):
            inbox.put(AddRequest(name, [ord(name), *PROMPT], params(50, ignore_eos=True)))
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


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("tried to allocate 20 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        MemoryError(),
    ],
    ids=["cuda", "cpu", "python"],
)
def test_memory_that_runs_out_at_the_start_is_told(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def engine(config: EngineConfig) -> Engine:
        raise error

    monkeypatch.setattr(process, "build", engine)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert process._load(config_for(tiny_model_dir), theirs) is None
        message = asyncio.run(_first_message(ours))
    assert isinstance(message, EngineFailed) and "--kv-cache-memory" in message.message


def test_captures_that_failed_are_told(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def capture_graphs(*arguments: object) -> None:
        raise GraphCaptureError("The capture of 8 requests failed: stream is capturing")

    monkeypatch.setattr("engine.build.capture_graphs", capture_graphs)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert process._load(config_for(tiny_model_dir), theirs) is None
        message = asyncio.run(_first_message(ours))
        assert isinstance(message, EngineFailed) and message.eager_may_start
        assert "8 requests failed" in message.message


def test_what_is_loaded_is_kept_out_of_garbage_collections(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []
    monkeypatch.setattr(process, "build", lambda config: called.append("load"))
    for name in ("collect", "freeze"):
        monkeypatch.setattr(gc, name, partial(called.append, name))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        process._load(config_for(tiny_model_dir), theirs)
    assert called == ["load", "collect", "freeze"]


async def _first_message(connection: socket.socket) -> ToServer | None:
    reader, writer = await asyncio.open_connection(sock=connection)
    try:
        return await channel.receive_async(reader)
    finally:
        writer.close()
