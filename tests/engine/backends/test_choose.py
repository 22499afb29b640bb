"""A backend is chosen once, and a new one takes a file and a line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.answering import EngineMode
from engine.backends import choose as choosing
from engine.backends.backend import Backend
from engine.backends.choose import BACKENDS, backend_named, choose
from engine.backends.native.library import kernels
from engine.build import build
from engine.config import EngineConfig
from engine.model.loader import load_decoder
from heads.checkpoint import save_heads
from tests.engine.backends.toy import ToyBackend
from tests.engine.families import full
from tests.engine.runner.test_heads_drafter import hydra
from tests.engine.tiny import CPU, place

PROMPTS = [[5, 6, 7, 8], list(range(30))]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_backend_takes_one_file_and_one_registration(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    """All that the engine computes goes through it, from the weights to the trees of heads."""
    save_heads(tmp_path, hydra(), "tiny", load_decoder(tiny_model_dir, torch.float32, CPU).embedding)
    full(12, 3, 2).save(tmp_path / "tree.json")
    config = EngineConfig(
        model_dir=str(tiny_model_dir),
        heads_dir=str(tmp_path),
        device="cpu",
        dtype="float32",
        kv_cache_memory=1 << 22,
        max_num_seqs=2,
    )
    answers = []
    for registered in (BACKENDS, {"toy": ToyBackend, **BACKENDS}):
        monkeypatch.setattr(choosing, "BACKENDS", registered)
        engine = build(config, fixed_drafts=8)
        answers.append(EngineMode("", engine).run_many(PROMPTS, 20, 2, temperature).outputs)
    assert engine.info.backend == "toy"
    assert answers[0] == answers[1]
    toy = engine._runner.backend
    assert isinstance(toy, ToyBackend)
    expected = {"attention", "write", "move", "tree_grower", "draw" if temperature else "argmax"}
    assert expected <= set(toy.calls) and toy.calls["attention"] > 20


def test_torch_does_what_no_other_does(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose(place()).name == "torch"  # a small model in float32
    assert backend_named("native", place()) is None
    for name in ("triton", "native"):
        monkeypatch.setitem(BACKENDS, name, lambda place: None)
    assert type(choose(place())) is BACKENDS["torch"]


@pytest.mark.skipif(kernels() is None, reason="no AVX-512 VNNI and BF16, or no C compiler")
def test_kernels_draw_for_models_that_they_do_not_run() -> None:
    backend: Backend = choose(place())
    assert type(backend) is not BACKENDS["torch"] and backend.torch_threads is None
