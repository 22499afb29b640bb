"""What the tests of the engine process share: one that runs, and the tokens it answers with."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from engine.client import EngineClient
from engine.config import EngineConfig
from engine.messages import RequestOutput, StepStats
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
