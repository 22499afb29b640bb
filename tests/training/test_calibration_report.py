"""What `gorgon calibrate` prints: rates beside what they would be if heads were right independently."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli.main import main
from tests.training.tiny import VOCAB, tiny_decoder, tiny_documents
from training import heads_recipe
from training.calibrate import MAX_RANK, Calibration, Rates
from training.calibration_report import independent_tokens, report
from training.heads_recipe import HeadsConfig
from training.heads_trainer import TrainerConfig
from trees.family import TreeFamily


def rates(*first: float) -> list[float]:
    return [*first, *[0.0] * (MAX_RANK - len(first))]


# The second head is right mostly where the first one is: 0.6 of the time, not 0.4.
FAMILY = TreeFamily(((0,), (0, 0), (1,), (1, 0)), (0.5, 0.3, 0.25, 0.05))
RESULT = Calibration(
    num_positions=1000,
    hit_rates=[rates(0.5, 0.25), rates(0.4, 0.125)],
    tokens_per_step={1: 1.45, 4: 2.0},
    family=FAMILY,
    by_task={
        "qa": Rates(700, [rates(0.625), rates(0.375)], {1: 1.5, 4: 2.25}),
        "code": Rates(300, [rates(0.125), rates(0.0625)], {1: 1.25, 4: 1.75}),
    },
)


def line_of(start: str) -> list[str]:
    [line] = [line for line in report(RESULT) if line.startswith(start)]
    return line.split()


def test_rates_are_conditional_on_the_parent_and_beside_them_independent() -> None:
    assert RESULT.conditional() == pytest.approx([0.5, 0.6, 0.25, 0.2])
    assert RESULT.independent() == pytest.approx([0.5, 0.2, 0.25, 0.1])
    assert independent_tokens(RESULT) == pytest.approx([1.0, 1.5, 1.7, 1.95, 2.05])
    # ranks, node, accepted, independent, given its parent, the head's own
    assert line_of("1 1  ") == ["1", "1", "2", "30.0", "20.0", "60.0", "40.0"]
    assert line_of("2 1  ") == ["2", "1", "4", "5.0", "10.0", "20.0", "40.0"]


def test_hit_rates_stand_by_head_and_rank_and_by_task() -> None:
    text = report(RESULT)
    assert text[0] == "measured on 1000 held-out positions"
    assert line_of("0  ")[:3] == ["0", "50.0", "25.0"] and line_of("0  ")[-1] == "75.0"
    assert line_of("qa") == ["qa", "700", "62.5", "37.5", "1.50", "2.25"]
    assert line_of("code") == ["code", "300", "12.5", "6.2", "1.25", "1.75"]
    single = Calibration(10, RESULT.hit_rates, {4: 2.0}, FAMILY, {})
    assert not any("By task" in line for line in report(single))


def test_the_command_says_what_it_measured_and_what_comes_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(heads_recipe, "_load", lambda *_: (tiny_decoder(), tiny_documents(60)))
    heads, data = tmp_path / "heads", tmp_path / "text.jsonl"
    data.touch()
    config = TrainerConfig(epochs=1, batch=128, lr=2e-2, warmup=5)
    shape = HeadsConfig(heads=2, layers=1, vocab=VOCAB)
    heads_recipe.train_heads("tiny", data, heads, heads / "cache", 10**6, shape, config)
    capsys.readouterr()
    assert main(["calibrate", "--heads", str(heads), "--model", "tiny", "--data", str(data)]) == 0
    printed = capsys.readouterr().out
    for words in ("Hit rates", "given its parent", "independent", "By task", "even", "odd"):
        assert words in printed
    assert f"Next, measure it at serving: gorgon evaluate --model tiny --heads {heads} --out DIR" in printed
    assert (heads / "tree.png").read_bytes().startswith(b"\x89PNG")
    tree = json.loads((heads / "tree.json").read_text())
    assert set(tree["by_task"]) == {"even", "odd"}
    assert sum(task["positions"] for task in tree["by_task"].values()) == tree["positions"]

    monkeypatch.setattr("training.plots.find_spec", lambda name: None)
    (heads / "tree.png").unlink()
    assert main(["calibrate", "--heads", str(heads), "--model", "tiny", "--data", str(data)]) == 0
    assert "gorgon-serve[report]" in capsys.readouterr().out
    assert not (heads / "tree.png").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--heads", "nowhere", "--data", __file__], "--heads: nowhere is no folder of a head set"),
        (["--heads", ".", "--data", "nowhere.jsonl"], "--data: nowhere.jsonl is no file"),
    ],
)
def test_what_is_not_there_is_named(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["calibrate", *argv]) == 2
    assert message in capsys.readouterr().err
