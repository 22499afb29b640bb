"""An engine that was killed comes back as what it was: the same number formats, the same text."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from pathlib import Path

import pytest

from engine.client import EngineClient
from engine.config import EngineConfig
from engine.errors import EngineDeadError
from engine.text.tokenizer import load_chat_tokenizer
from tests.engine.processes import collect, running, tokens_of, until
from tests.engine.prompts import CHATS

KILLS = 20
NAMES = ("code-fix", "maths-count", "poem", "repeat", "long-question", "unicode-japanese")


@pytest.mark.slow
@pytest.mark.timeout(3600)
async def test_twenty_kills_under_load_change_neither_format_nor_text(default_model_dir: Path) -> None:
    tokenizer = load_chat_tokenizer(default_model_dir)
    prompts = [tokenizer.encode_chat([{"role": "user", "content": CHATS[name]}]) for name in NAMES]

    async def answers(client: EngineClient) -> list[list[int]]:
        asked = [
            collect(client, f"{index}", prompt, max_tokens=48, temperature=0.0)
            for index, prompt in enumerate(prompts)
        ]
        return [tokens_of(outputs) for outputs in await asyncio.gather(*asked)]

    async def load(client: EngineClient, name: str) -> None:
        with contextlib.suppress(EngineDeadError):
            await collect(client, name, prompts[0], max_tokens=400, ignore_eos=True)

    async with running(
        EngineConfig(model_dir=str(default_model_dir), device="cpu", max_num_seqs=8)
    ) as client:
        formats, expected = client.info.quantization, await answers(client)
        for kill in range(KILLS):
            busy = [asyncio.create_task(load(client, f"load-{kill}-{n}")) for n in range(4)]
            await asyncio.sleep(0.1 * (kill % 5))
            pid = client.process_id
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            await asyncio.gather(*busy)
            await until(lambda: client.is_healthy() and client.process_id != pid, 600.0)  # noqa: B023
            assert client.info.quantization == formats
            assert await answers(client) == expected
        assert client.num_restarts == KILLS
