"""The quality benchmark's comparisons, on numbers that are known and on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from engine.answering import Run
from engine.config import EngineConfig
from evaluation.quality import (
    QualityOptions,
    Text,
    common_prefix,
    compare_runs,
    compare_texts,
    read_texts,
    run,
)
from tests.evaluation.tiny import save_head_set, save_model, write_prompts


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-model")
    save_model(folder)
    return folder


def test_answers_are_compared_up_to_the_first_other_token() -> None:
    assert common_prefix([1, 2, 3], [1, 2, 4]) == 2
    assert common_prefix([1, 2], [1, 2, 3]) == 2
    expected = Run(outputs={0: [1, 2, 3, 4], 1: [5, 6]})
    found = Run(outputs={0: [1, 9, 3, 4], 1: [5, 6]})
    assert compare_runs(found, expected) == {"greedy_same": 0.5, "answers_same": 0.5}


def test_texts_are_compared_by_perplexity_and_likeliest_token() -> None:
    expected = Text(8.0, torch.tensor([1, 2, 3, 4]))
    assert compare_texts(Text(8.4, torch.tensor([1, 2, 0, 4])), expected) == {
        "perplexity": 8.4,
        "perplexity_percent": 5.0,
        "likeliest_same": 0.75,
    }


def test_perplexity_is_that_of_the_model(model_dir: Path) -> None:
    from transformers import AutoModelForCausalLM

    texts = [[(7 * place) % 128 for place in range(30)], [(5 * place + 1) % 128 for place in range(12)]]
    config = EngineConfig(model_dir=str(model_dir), dtype="float32", device="cpu")
    reference = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    with torch.no_grad():
        losses = [
            reference(input_ids=(ids := torch.tensor([text])), labels=ids).loss * (len(text) - 1)
            for text in texts
        ]
    expected = float((torch.stack(losses).sum() / 40).exp())
    assert read_texts(config, texts).perplexity == pytest.approx(expected, rel=1e-4)


def test_the_last_line_is_json_with_every_format(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    heads_dir = tmp_path / "heads"
    heads_dir.mkdir()
    save_head_set(heads_dir, model_dir)
    options = QualityOptions(
        model=str(model_dir),
        heads=str(heads_dir),
        prompts=write_prompts(tmp_path / "prompts.jsonl", 3),
        num_prompts=3,
        max_tokens=6,
        seed=0,
        formats=("none", "int4"),
    )
    assert run(options) == 0
    weights = json.loads(capsys.readouterr().out.splitlines()[-1])["weights"]
    assert list(weights) == ["float32", "none", "int4"]
    # The same model in bfloat16, and with rounded weights: near it, and not the same.
    assert abs(weights["none"]["perplexity_percent"]) < 3
    assert 0 < abs(weights["int4"]["perplexity_percent"]) < 50
    assert weights["none"]["likeliest_same"] > weights["int4"]["likeliest_same"]
    assert all(weights[name]["beyond_near_ties"] == 0 for name in ("none", "int4"))
