"""The whole recipe on a tiny model: what it leaves behind is a head set that loads, with tree and card."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from cli.main import main
from heads.checkpoint import load_heads, save_heads
from heads.medusa import MedusaHeads
from tests.training.tiny import VOCAB, tiny_decoder, tiny_documents
from tests.training.tiny_checkpoint import save_checkpoint, save_text
from training import heads_recipe
from training.dataset import DataError, Document
from training.heads_recipe import HeadsConfig
from training.heads_trainer import TrainerConfig, TrainingError
from training.sequences import SequenceBatch
from trees.family import TreeFamily

HEADS = HeadsConfig(heads=2, layers=1, vocab=VOCAB)
CONFIG = TrainerConfig(epochs=8, batch=128, lr=2e-2, warmup=5)


def give(monkeypatch: pytest.MonkeyPatch, documents: list[Document]) -> None:
    monkeypatch.setattr(heads_recipe, "_load", lambda *_: (tiny_decoder(), documents))


def train(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, tiny_documents(120))
    heads_recipe.train_heads("tiny", Path("text.jsonl"), out, out / "cache", 10**6, HEADS, CONFIG)


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
    result = heads_recipe.calibrate_heads(tmp_path, "tiny", Path("text.jsonl"), tmp_path / "cache", 0)
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
    result = heads_recipe.calibrate_heads(tmp_path, "tiny", Path("other.jsonl"), tmp_path / "cache", 0)
    assert {file.name: file.read_bytes() for file in trained_on.iterdir()} == kept
    text = card.read_text()
    assert f"On {result.num_positions} held-out positions of `other.jsonl`" in text
    assert text.count("## Measured") == text.count("tokens per step") == 1
    assert "Trained on `text.jsonl`" in text and text.endswith("\n\n## Licence\n\nmine\n")


def test_calibration_takes_its_batches_to_the_device_of_the_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path, monkeypatch)
    places: list[torch.device] = []
    monkeypatch.setattr(SequenceBatch, "to", lambda batch, place: places.append(place) or batch)
    heads_recipe.calibrate_heads(tmp_path, "tiny", Path("text.jsonl"), tmp_path / "cache", 0, "cpu")
    assert set(places) == {torch.device("cpu")}


@pytest.mark.gpu
def test_both_devices_measure_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path, monkeypatch)
    monkeypatch.setattr(
        heads_recipe, "_load", lambda *given: (tiny_decoder().to(given[-1]), tiny_documents(120))
    )
    found = [
        heads_recipe.calibrate_heads(tmp_path, "tiny", Path("text.jsonl"), tmp_path / "cache", 0, place)
        for place in ("cpu", "cuda")
    ]
    assert found[1].hit_rates[0][0] == pytest.approx(found[0].hit_rates[0][0], abs=0.02)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_calibrating_on_a_device_that_is_not_there_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = save_text(tmp_path / "text.jsonl", 2)
    command = ["calibrate", "--heads", str(tmp_path), "--data", str(data), "--device", "cuda"]
    assert main(command) == 2
    assert "--device: no CUDA device" in capsys.readouterr().err


def test_a_run_is_not_taken_up_from_another_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starts = tmp_path / "a", tmp_path / "b"
    module = MedusaHeads(2, 1, 32, VOCAB)
    for value, start in enumerate(starts):
        torch.nn.init.constant_(module.biases[0], value)
        save_heads(start, module, "tiny", tiny_decoder().embedding)
    give(monkeypatch, tiny_documents(60))
    out = tmp_path / "out"

    def run(start: Path) -> None:
        heads, config = HeadsConfig(start=start), dataclasses.replace(CONFIG, epochs=1)
        heads_recipe.train_heads("tiny", Path("text.jsonl"), out, out / "cache", 10**6, heads, config)

    run(starts[0])
    run(starts[0])  # finished already: it is taken up at its end
    with pytest.raises(TrainingError, match="other settings, data or weights"):
        run(starts[1])


def test_conversations_beyond_the_positions_of_the_model_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = save_text(tmp_path / "text.jsonl", 3)
    answer = {"role": "assistant", "content": " ".join(["w1"] * 128)}  # the model has 128 positions
    with data.open("a") as file:
        file.write(json.dumps({"messages": [{"role": "user", "content": "w2"}, answer]}) + "\n")
    model = str(save_checkpoint(tmp_path / "model"))
    _, documents = heads_recipe._load(model, data, 10**6, 0, torch.device("cpu"))
    assert len(documents) == 3
    assert "1 conversations longer than 128 tokens" in capsys.readouterr().out


def test_text_without_a_held_out_share_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path, monkeypatch)
    give(monkeypatch, [d for d in tiny_documents(20) if not d.held_out])
    with pytest.raises(DataError, match="held-out"):
        heads_recipe.calibrate_heads(tmp_path, "tiny", Path("text.jsonl"), tmp_path / "held-out", 0)
