"""By the CPU kernels, the default model answers token for token the same whatever is drafted and batched, in
the number formats that people serve, at any temperature. There is no rounding to allow for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.answering import EngineMode, Run
from engine.backends.native.library import kernels
from engine.build import build
from engine.config import EngineConfig, Quantization
from engine.engine import Engine
from engine.text.tokenizer import load_chat_tokenizer
from heads.defaults import DEFAULT_MODEL
from heads.registry.names import resolve_heads, resolve_model
from tests.engine.prompts import CHATS

pytestmark = [
    pytest.mark.skipif(kernels() is None, reason="no AVX-512 VNNI and BF16, or no C compiler"),
    pytest.mark.timeout(600),
]

LENGTH = 64
NAMES = ("code-fix", "maths-count", "unicode-japanese", "poem", "repeat", "long-question")
TEMPERATURES = (0.0, 0.9)


def make_engine(model_dir: Path, quantization: Quantization, **options: Any) -> Engine:
    heads = resolve_heads("auto", resolve_model(DEFAULT_MODEL))
    settings = {"speculation": "auto", "max_num_batched_tokens": 512, "block_size": 16, **options}
    fixed = settings.pop("fixed_drafts", None)
    config = EngineConfig(
        model_dir=str(model_dir),
        heads_dir=None if heads is None else str(heads),
        device="cpu",
        dtype="bfloat16",
        quantization=quantization,
        max_model_len=1024,
        max_num_seqs=8,
        kv_cache_memory=256 << 20,
        **settings,
    )
    return build(config, fixed_drafts=fixed)


def answers(engine: Engine, prompts: list[list[int]], together: int, temperature: float) -> Run:
    return EngineMode("", engine).run_many(prompts, LENGTH, together, temperature, seed=7)


@pytest.mark.parametrize("quantization", ["int4", "none"])
def test_answers_are_the_same_token_for_token(default_model_dir: Path, quantization: Quantization) -> None:
    tokenizer = load_chat_tokenizer(default_model_dir)
    prompts = [tokenizer.encode_chat([{"role": "user", "content": CHATS[name]}]) for name in NAMES]
    off = make_engine(default_model_dir, quantization, speculation="off")
    assert off.info.quantization == quantization
    others = {
        "heads and n-grams, small blocks, small chunks": make_engine(
            default_model_dir, quantization, fixed_drafts=12, block_size=5, max_num_batched_tokens=33
        ),
        "sizes chosen": make_engine(default_model_dir, quantization),
    }
    for temperature in TEMPERATURES:
        expected = answers(off, prompts, 1, temperature).outputs
        assert answers(off, prompts, 6, temperature).outputs == expected
        for name, engine in others.items():
            for together in (1, 4):
                run = answers(engine, prompts, together, temperature)
                assert run.outputs == expected, (name, together, temperature)
                assert sum(run.accepted_by_depth) > 0 or name == "sizes chosen"
