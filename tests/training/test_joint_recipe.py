"""What cannot work is refused before training, and a half-precision run trains like a whole one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft", reason="needs gorgon-serve[train]")
from accelerate.state import AcceleratorState

from cli.main import main
from heads.checkpoint import save_heads
from heads.medusa import MedusaHeads
from tests.training.tiny_checkpoint import VOCAB, counting_documents, save_checkpoint, save_text
from training import devices
from training.backbone import Backbone, load_model
from training.dataset import Document
from training.devices import make_accelerator
from training.joint import JointConfig, JointTrainer
from training.output_cost import common_share, greedy_continuations, measure_cost, perplexity


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture
def other_precision() -> Iterator[None]:
    """A process has one number format for all its accelerators."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def command(checkpoint: Path, folder: Path) -> list[str]:
    data = save_text(folder / "text.jsonl", 120)
    return [
        *("train", "medusa2", "--model", str(checkpoint), "--data", str(data), "--out", str(folder / "out")),
        *("--mixed-precision", "no"),
    ]


def test_a_missing_library_is_named(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(devices, "find_spec", lambda name: None if name == "peft" else name)
    assert main(command(checkpoint, tmp_path)) == 1
    assert "needs peft: pip install 'gorgon-serve[train]'" in capsys.readouterr().err


def test_fresh_heads_need_a_warm_up(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command(checkpoint, tmp_path), "--heads-first-steps", "0"]) == 1
    assert "give --heads or --heads-first-steps" in capsys.readouterr().err


def test_heads_of_another_model_are_refused(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(5)
    save_heads(tmp_path / "heads", MedusaHeads(2, 1, 32, VOCAB), "other", torch.randn(VOCAB, 32))
    assert main([*command(checkpoint, tmp_path), "--heads", str(tmp_path / "heads")]) == 1
    assert "this is another model" in capsys.readouterr().err


@pytest.mark.usefixtures("other_precision")
def test_bfloat16_trains(checkpoint: Path, tmp_path: Path) -> None:
    losses = []
    torch.manual_seed(1)
    backbone = Backbone(load_model(checkpoint, torch.bfloat16), lora=True)
    config = JointConfig(heads_first_steps=3, batch=8, accumulate=2, lr=5e-3, warmup=3, epochs=3)
    heads = MedusaHeads(2, 1, 32, VOCAB, root_input=True)
    accelerator = make_accelerator("bf16", heads_first=True)
    trainer = JointTrainer(config, counting_documents(80), backbone, heads, tmp_path, accelerator)
    for _ in range(trainer.num_steps):
        losses.append(trainer.train_step().loss_heads[0])
    assert {p.dtype for p in trainer.joint.backbone.trained().values()} == {torch.float32}
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])


def test_a_model_costs_nothing_against_itself(checkpoint: Path) -> None:
    documents = counting_documents(3)
    prompts = [d.token_ids[:4] for d in documents]
    first, second = (greedy_continuations(checkpoint, prompts, "cpu") for _ in range(2))
    assert first == second
    assert 1 < perplexity(checkpoint, documents, torch.device("cpu")) < 10 * VOCAB


def test_long_prompts_are_continued_as_far_as_the_model_has_positions(checkpoint: Path) -> None:
    long = Document([5] * 101, [(100, 101)], greedy=True, held_out=True)
    full = Document([5] * 128, [(128, 128)], greedy=True, held_out=True)  # an answer that was cut at once
    cost = measure_cost(checkpoint, checkpoint, [long], 2, "cpu")
    assert (cost.prompts, cost.identical_continuations) == (1, 1.0)
    [answer] = greedy_continuations(checkpoint, [long.token_ids[:100]], "cpu")
    assert 1 <= len(answer) <= 28
    assert measure_cost(checkpoint, checkpoint, [full, long], 2, "cpu").prompts == 1


def test_conversations_beyond_the_positions_of_the_model_are_left_out(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "text.jsonl"
    answer = {"role": "assistant", "content": " ".join(["w1"] * 128)}  # the model has 128 positions
    data.write_text(json.dumps({"messages": [{"role": "user", "content": "w2"}, answer]}) + "\n")
    out = ["--model", str(checkpoint), "--data", str(data), "--out", str(tmp_path / "out")]
    assert main(["train", "medusa2", *out, "--mixed-precision", "no", "--max-length", "4000"]) == 1
    assert "all 1 conversations of text.jsonl are longer than 128 tokens" in capsys.readouterr().err


def test_common_share_ends_at_the_first_difference() -> None:
    assert common_share([1, 2, 3, 4], [1, 2, 9, 4]) == 0.5
    assert common_share([1, 2, 3, 4], [1, 2, 3]) == 0.75
    assert common_share([1, 2], [1, 2, 3]) == 1
