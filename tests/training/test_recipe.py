"""The whole recipe on a tiny model: what it leaves behind is a head set that loads, with tree and card."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from heads.checkpoint import load_heads
from tests.training.tiny import VOCAB, tiny_decoder, tiny_documents
from training import recipe
from training.dataset import DataError, Document
from training.recipe import HeadsConfig
from training.trainer import TrainerConfig
from trees.family import TreeFamily

HEADS = HeadsConfig(heads=2, layers=1, vocab=VOCAB)
CONFIG = TrainerConfig(epochs=8, batch=128, lr=2e-2, warmup=5)


def give(monkeypatch: pytest.MonkeyPatch, documents: list[Document]) -> None:
    monkeypatch.setattr(recipe, "_load", lambda *_: (tiny_decoder(), documents))


def train(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, tiny_documents(120))
    recipe.train_medusa1("tiny", Path("text.jsonl"), out, out / "cache", 10**6, HEADS, CONFIG)


def test_training_leaves_a_complete_head_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path, monkeypatch)
    heads = load_heads(tmp_path)
    family = TreeFamily.load(tmp_path / "tree.json")
    assert heads.base_model == "tiny"
    assert 1 <= family.max_depth <= heads.module.num_heads
    card = (tmp_path / "README.md").read_text()
    assert "Heads for tiny" in card and "`text.jsonl`" in card and "| head 1 |" in card


def test_calibrating_again_measures_the_same_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path, monkeypatch)
    before = json.loads((tmp_path / "tree.json").read_text())
    result = recipe.calibrate_heads(tmp_path, "tiny", Path("text.jsonl"), tmp_path / "cache", 0)
    assert json.loads((tmp_path / "tree.json").read_text()) == before
    assert result.family.paths == TreeFamily.load(tmp_path / "tree.json").paths


def test_calibrating_keeps_the_training_cache_and_puts_its_figures_into_the_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path, monkeypatch)
    [trained_on] = (tmp_path / "cache").iterdir()
    kept = {file.name: file.read_bytes() for file in trained_on.iterdir()}
    card = tmp_path / "README.md"
    card.write_text(card.read_text() + "\n## Licence\n\nmine\n")
    give(monkeypatch, tiny_documents(60))
    result = recipe.calibrate_heads(tmp_path, "tiny", Path("other.jsonl"), tmp_path / "cache", 0)
    assert {file.name: file.read_bytes() for file in trained_on.iterdir()} == kept
    text = card.read_text()
    assert f"On {result.num_positions} held-out positions of `other.jsonl`" in text
    assert text.count("## Measured") == text.count("tokens per step") == 1
    assert "Trained on `text.jsonl`" in text and text.endswith("\n\n## Licence\n\nmine\n")


def test_text_without_a_held_out_share_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path, monkeypatch)
    give(monkeypatch, [d for d in tiny_documents(20) if not d.held_out])
    with pytest.raises(DataError, match="held-out"):
        recipe.calibrate_heads(tmp_path, "tiny", Path("text.jsonl"), tmp_path / "held-out", 0)
