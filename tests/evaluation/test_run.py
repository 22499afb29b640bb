"""An evaluation from the command line to its files, on a tiny model."""

from __future__ import annotations

import base64
import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest

from cli.main import main
from tests.evaluation.tiny import write_prompts

PNG = b"\x89PNG\r\n\x1a\n"
PROMPTS = 4


class Evaluation:
    """The command with settings small enough for the tiny model."""

    def __init__(self, model_dir: Path, heads_dir: Path, folder: Path) -> None:
        self.heads_dir, self.out = heads_dir, folder / "report"
        prompts = write_prompts(folder / "prompts.jsonl", PROMPTS)
        self.argv = ["evaluate", "--model", str(model_dir), "--heads", str(heads_dir)]
        self.argv += ["--prompts", str(prompts), "--out", str(self.out), "--max-tokens", "20"]
        self.argv += ["--dtype", "float32", "--device", "cpu", "--kv-cache-memory", "4M", "--block-size", "8"]
        self.argv += ["--max-num-seqs", "2", "--tree-nodes", "3", "12"]

    def run(self, *more: str) -> dict[str, Any]:
        assert main([*self.argv, *more]) == 0
        return dict(json.loads((self.out / "results.json").read_text()))


@pytest.fixture
def evaluation(
    model_dir: Path, heads_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Evaluation:
    """Without plots, which take longer than the rest."""
    monkeypatch.setattr("evaluation.run.draw", lambda figures, folder: [])
    return Evaluation(model_dir, heads_dir, tmp_path)


@pytest.fixture(scope="module")
def done(
    model_dir: Path, heads_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """The folder and results of an evaluation with everything in it."""
    evaluation = Evaluation(model_dir, heads_dir, tmp_path_factory.mktemp("done"))
    return evaluation.out, evaluation.run("--temperatures", "1", "0", "--all-turns")


def test_the_figures_follow_from_the_rows(done: tuple[Path, dict[str, Any]]) -> None:
    _, document = done
    assert document["modes"] == ["off", "auto", "tree:3", "tree:12", "merged:12", "ngram", "draft"]
    assert (document["prompts"], document["turns"]) == (PROMPTS, 2 * PROMPTS)
    assert [figures["temperature"] for figures in document["figures"]] == [0.0, 1.0]
    for figures in document["figures"]:
        rows = [row for row in document["rows"] if row["temperature"] == figures["temperature"]]
        assert list(figures["tasks"]) == ["all tasks", "a", "b"]
        for task, of_task in figures["tasks"].items():
            turns = [turn for row in rows if task in ("all tasks", row["task"]) for turn in row["turns"]]
            assert of_task["turns"] == len(turns) > 0
            for mode, values in of_task["modes"].items():
                runs = [turn["runs"][mode] for turn in turns]
                committed = [count for run in runs for count in run["committed"]]
                assert values["tokens"] == sum(run["tokens"] for run in runs) == sum(committed)
                assert values["tokens_per_step"]["mean"] == pytest.approx(
                    statistics.mean(committed), abs=1e-3
                )
                assert values["tokens_per_step"]["std"] == pytest.approx(
                    statistics.pstdev(committed), abs=1e-3
                )
                assert sum(values["histogram"].values()) == len(committed)
                assert values["histogram"]["1"] == committed.count(1)
                if mode == "off":
                    continue
                ratios = [
                    (run["tokens"] / run["seconds"])
                    / (turn["runs"]["off"]["tokens"] / turn["runs"]["off"]["seconds"])
                    for run, turn in zip(runs, turns, strict=True)
                ]
                assert values["speedup"]["end_to_end"]["median"] == pytest.approx(
                    statistics.median(ratios), abs=1e-3
                )
        for found in figures["exactness"].values():
            assert (found["answers"], found["identical"], found["wrong"]) == (2 * PROMPTS, 2 * PROMPTS, 0)
    best = document["figures"][0]["tasks"]["all tasks"]["modes"]["tree:12"]
    assert best["tokens_per_step"]["mean"] > 1.0 and best["drafts_per_step"] > 5.0


def test_the_report_shows_the_figures_and_needs_no_other_file(done: tuple[Path, dict[str, Any]]) -> None:
    out, document = done
    text, page = ((out / f"report.{end}").read_text() for end in ("md", "html"))
    for figures in document["figures"]:
        for mode, values in figures["tasks"]["all tasks"]["modes"].items():
            steps = values["tokens_per_step"]
            assert f"| {mode} | {steps['mean']:.2f} | {steps['std']:.2f} |" in text
            assert f"<td>{mode}</td><td>{steps['mean']:.2f}</td>" in page
        part = text.partition(f"## Temperature {figures['temperature']:g}")[2]
        for task in ("a", "b"):
            steps = figures["tasks"][task]["modes"]["ngram"]["tokens_per_step"]
            section = part.partition(f"### Task {task}")[2].partition("## ")[0]
            assert f"| ngram | {steps['mean']:.2f} | {steps['std']:.2f} |" in section
    for shown in (text, page):
        assert document["cpu"] in shown and document["date"] in shown
        assert "prompt lookup, 8 tokens" in shown and "first 1 of 2 layers, 4 tokens" in shown
    images = re.findall(r"!\[.*?\]\((.*?)\)", text)
    plots = {"speedup", "nodes", "depth", "histogram", "depth-tasks", "histogram-tasks"}
    assert set(images) == {f"{plot}-t{temperature}.png" for plot in plots for temperature in (0, 1)}
    embedded = [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,(.*?)"', page)]
    assert embedded == [(out / name).read_bytes() for name in images]
    assert all(image.startswith(PNG) for image in embedded)
    assert not re.search(r'(src|href)="(?!data:)', page)


def test_a_stopped_evaluation_goes_on(
    evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    evaluation.run("--num-prompts", "1")
    whole = evaluation.run()  # more prompts than before: what is there counts
    assert "1 of 4 answered already" in capsys.readouterr().err
    answers = evaluation.out / "answers.jsonl"
    lines = answers.read_text().splitlines(keepends=True)
    assert len(lines) == 1 + PROMPTS
    answers.write_text("".join(lines[:3]) + lines[3][:40])  # killed while it wrote the third prompt
    resumed = evaluation.run()
    error = capsys.readouterr().err
    assert "2 of 4 answered already" in error and "3/4" in error and "2/4," not in error
    assert resumed["rows"][:2] == whole["rows"][:2]
    for row, before in zip(resumed["rows"], whole["rows"], strict=True):
        assert row["id"] == before["id"]
        for name in ("off", "tree:3"):
            run, earlier = row["turns"][0]["runs"][name], before["turns"][0]["runs"][name]
            assert (run["tokens"], run["committed"]) == (earlier["tokens"], earlier["committed"])
    monkeypatch.setattr("evaluation.run.machine_facts", lambda: {"cpu": "new", "cores": 0, "gorgon": "1"})
    assert main(evaluation.argv) == 2
    assert "--out" in (message := capsys.readouterr().err) and "cores, cpu, gorgon" in message


def test_a_prompt_that_does_not_fit_is_told_and_not_counted(evaluation: Evaluation, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    long = {"id": "long", "category": "a", "messages": [{"role": "user", "content": "w3 " * 300}]}
    prompts.write_text(prompts.read_text() + json.dumps(long) + "\n")
    document = evaluation.run()
    [figures] = document["figures"]
    assert [refused["id"] for refused in figures["refused"]] == ["long"]
    assert figures["tasks"]["all tasks"]["prompts"] == PROMPTS
    assert "Not answered: long: The prompt has 300 tokens" in (evaluation.out / "report.md").read_text()


def test_the_card_gets_the_main_table_in_the_place_of_an_older_one(
    evaluation: Evaluation, capsys: Any
) -> None:
    card = evaluation.heads_dir / "README.md"
    card.write_text("# Heads\n\n## Evaluation\n\nold figures\n\n## Licence\n\nApache-2.0\n")
    document = evaluation.run("--card")
    text = card.read_text()
    steps = document["figures"][0]["tasks"]["all tasks"]["modes"]["tree:12"]["tokens_per_step"]
    assert f"| tree:12 | {steps['mean']:.2f} |" in text and "old figures" not in text
    assert text.startswith("# Heads\n\n## Evaluation\n") and text.endswith("\n\n## Licence\n\nApache-2.0\n")
    assert "draft: the model's own first 1 of 2 layers" in text
    assert "Next, publish the head set: gorgon heads push" in capsys.readouterr().out
    evaluation.run("--card")  # its own table does not make the head set another one
    assert card.read_text().count("## Evaluation") == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--tree-nodes", "13"], "--draft-tokens: must be 1 to 12"),
        (["--draft-tokens", "8", "--max-tree-nodes", "8"], "--draft-tokens: must be 1 to 7"),
        (["--heads", "none"], "--heads: "),
        (["--temperatures", "-1"], "--temperatures: must be 0 or more"),
        (["--num-prompts", "9"], "--num-prompts: must be 1 to 4"),
        (["--num-prompts", "0"], "--num-prompts: must be 1 to 4"),
        (["--max-tokens", "0"], "--max-tokens: must be at least 1"),
        (["--baselines", "none", "ngram"], "--baselines: none goes alone"),
        (["--baselines", "ngram", "--draft-layers", "1"], "--baselines: a draft model is given"),
        (["--draft-layers", "3"], "--draft-layers: must be 1 to 2, the model's own, not 3"),
        (["--draft-layers", "0"], "--draft-layers: must be 1 to 2"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    argv: list[str], message: str, evaluation: Evaluation, capsys: Any
) -> None:
    assert main([*evaluation.argv, *argv]) == 2
    assert message in capsys.readouterr().err
    assert not evaluation.out.exists()


def test_without_matplotlib_nothing_is_measured(
    evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("evaluation.plots.find_spec", lambda name: None)
    assert main(evaluation.argv) == 1
    assert "pip install 'gorgon-serve[report]'" in capsys.readouterr().err
    assert not evaluation.out.exists()
