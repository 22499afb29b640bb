"""Heads that bring their own projections, as imported ones do, serve like any others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.build import build
from engine.config import EngineConfig
from engine.messages import AddRequest
from engine.model.loader import load_vocabulary
from heads.checkpoint import save_heads
from heads.formats.load import load_foreign
from heads.medusa import MedusaHeads
from tests.engine.families import full
from tests.engine.helpers import params
from tests.heads.formats.checkpoints import write

FAMILY = full(12, 3, 2)
PROMPTS = [[(11 * i + 3 * p) % 128 for p in range(n)] for i, n in enumerate((3, 20, 40))]


def answers(model_dir: Path, heads_dir: Path | None) -> tuple[list[list[int]], int]:
    """The tokens of each answer and how many guesses were right."""
    config = EngineConfig(
        model_dir=str(model_dir),
        dtype="float32",
        device="cpu",
        kv_cache_memory=4 << 20,
        heads_dir=None if heads_dir is None else str(heads_dir),
    )
    engine = build(config, fixed_drafts=None if heads_dir is None else 12)
    for index, prompt in enumerate(PROMPTS):
        engine.add_request(AddRequest(str(index), prompt, params(30, ignore_eos=True)))
    tokens: list[list[int]] = [[] for _ in PROMPTS]
    accepted = 0
    while engine.has_work():
        step = engine.step()
        accepted += sum(step.stats.accepted_by_depth)
        for output in step.outputs:
            tokens[int(output.request_id)] += output.token_ids
    return tokens, accepted


def test_own_projections_guess_as_well_as_the_shared_one_they_are_twice(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Twice the base's projection is not recognised as the base's and ranks tokens as the base does."""
    embedding, lm_head = load_vocabulary(tiny_model_dir)
    save_heads(tmp_path / "shared", MedusaHeads(2, 1, 64, 128), "tiny", embedding)
    tensors = {}
    for head in range(2):
        tensors[f"{head}.0.linear.weight"] = torch.zeros(64, 64)
        tensors[f"{head}.0.linear.bias"] = torch.zeros(64)
        tensors[f"{head}.1.weight"] = 2 * lm_head
    foreign = load_foreign(write(tmp_path / "theirs", "medusa_lm_head.pt", tensors), lm_head)
    assert foreign.module.projection is not None
    save_heads(tmp_path / "own", foreign.module, "tiny", embedding, foreign.dtype)
    for folder in ("shared", "own"):
        FAMILY.save(tmp_path / folder / "tree.json")
    expected, _ = answers(tiny_model_dir, None)
    shared, own = (answers(tiny_model_dir, tmp_path / folder) for folder in ("shared", "own"))
    assert shared[0] == own[0] == expected
    # They are surer of the same guesses, so that their trees are a little deeper and narrower.
    assert own[1] == pytest.approx(shared[1], rel=0.2) and shared[1] > 10
