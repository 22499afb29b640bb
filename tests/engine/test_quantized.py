"""An engine with quantized weights serves as any other does, and speculation leaves its text as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.answering import EngineMode
from engine.build import build
from engine.config import EngineConfig, Quantization
from engine.engine import Engine
from engine.errors import ConfigError
from engine.model.loader import load_decoder
from evaluation.exactness import compare_answers
from heads.checkpoint import save_heads
from heads.medusa import MedusaHeads
from tests.engine.families import full

PROMPTS = [[(11 * i + 3 * p) % 128 for p in range(n)] for i, n in enumerate((3, 20, 40))]
LENGTH = 40
KINDS: list[Quantization] = ["int4"]
if torch.cpu._is_vnni_supported():
    KINDS.append("int8")


@pytest.fixture(scope="module")
def heads_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("heads")
    decoder = load_decoder(tiny_model_dir, torch.float32, torch.device("cpu"))
    save_heads(folder, MedusaHeads(2, 1, 64, 128), "tiny", decoder.embedding)
    full(12, 3, 2).save(folder / "tree.json")
    return folder


def make_engine(model_dir: Path, fixed_drafts: int | None = None, **settings: Any) -> Engine:
    sizes = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "kv_cache_memory": 4 << 20, "block_size": 8}
    config = EngineConfig(
        model_dir=str(model_dir), device="cpu", **{"dtype": "bfloat16", **sizes, **settings}
    )
    return build(config, fixed_drafts=fixed_drafts)


@pytest.mark.parametrize("quantization", KINDS)
def test_speculation_leaves_the_text_as_it_is(
    tiny_model_dir: Path, heads_dir: Path, quantization: Quantization
) -> None:
    off = make_engine(tiny_model_dir, speculation="off", quantization=quantization)
    on = make_engine(tiny_model_dir, 12, heads_dir=str(heads_dir), quantization=quantization)
    assert off.info.quantization == on.info.quantization == quantization
    expected = EngineMode("off", off).run_many(PROMPTS, LENGTH, concurrency=3)
    found = EngineMode("on", on).run_many(PROMPTS, LENGTH, concurrency=3)
    assert sum(found.accepted_by_depth) > 0
    for index, prompt in enumerate(PROMPTS):
        difference = compare_answers(
            off, prompt, expected.outputs[index], found.outputs[index], temperature=0.0, seed=0
        )
        assert difference is None or difference.near_tie


def test_float32_stays_float32(tiny_model_dir: Path) -> None:
    info = make_engine(tiny_model_dir, dtype="float32").info
    assert (info.dtype, info.quantization) == ("float32", "none")
    with pytest.raises(ConfigError, match=r"--quantization: .*--dtype bfloat16"):
        make_engine(tiny_model_dir, dtype="float32", quantization="int4")


def test_auto_leaves_weights_that_4_bits_cannot_hold(tiny_model_dir: Path) -> None:
    info = make_engine(tiny_model_dir).info  # random numbers, in no groups, of a shape that our kernels leave
    assert (info.quantization, info.backend) == ("none", "torch")
