"""Evaluation prompts in training text are found, and what merely resembles them is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cli.main import main
from training.dataset import DataError
from training.overlap import find_overlaps, words_of

WORDS = [f"word{i}" for i in range(30)]


def row(name: str, *texts: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"id": name, "messages": [{"role": roles[i % 2], "content": t} for i, t in enumerate(texts)]}


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    second = {"role": "user", "content": "Shorter, please."}
    long = row("long", " ".join(WORDS))
    return write(
        tmp_path / "evaluation.jsonl",
        row("short", "What is 2 + 2?"),
        {**long, "messages": [*long["messages"], second]},
    )


def found(tmp_path: Path, evaluation: Path, *rows: dict[str, Any]) -> list[str]:
    data = write(tmp_path / "data.jsonl", row("other", "nothing of the kind"), *rows)
    return [overlap.row.id for overlap in find_overlaps([data], [evaluation]).overlaps]


@pytest.mark.parametrize("begin", [0, 7, 17])
def test_13_words_are_found_and_12_are_not(tmp_path: Path, evaluation: Path, begin: int) -> None:
    thirteen = "so: " + " ".join(WORDS[begin : begin + 13]).upper().replace(" ", ", ") + "!"
    twelve = "so: " + " ".join(WORDS[begin : begin + 12]) + " end"
    rows = [row("planted", "before " + thirteen), row("near", twelve), row("gap", twelve + " " + WORDS[-1])]
    assert found(tmp_path, evaluation, *rows) == ["planted"]


def test_a_short_turn_is_found_whatever_its_case_and_punctuation(tmp_path: Path, evaluation: Path) -> None:
    rows = [
        row("same", "what is 2+2"),
        row("longer", "What is 2 + 2 + 1?"),
        row("turn", "hi", "ho", "SHORTER please"),
    ]
    assert found(tmp_path, evaluation, *rows) == ["same", "turn"]


def test_answers_count_and_are_told_apart(tmp_path: Path, evaluation: Path) -> None:
    data = write(tmp_path / "data.jsonl", row("a", "hi", " ".join(WORDS[3:20])))
    [overlap] = find_overlaps([data], [evaluation]).overlaps
    assert overlap.roles == ("assistant",)
    assert [r.id for r in overlap.partial] == ["long"] and not overlap.exact
    assert overlap.words == " ".join(WORDS[3:16])


def test_characters_count_where_no_spaces_are_written() -> None:
    assert words_of("Qwen3は速い。") == ["qwen3", "は", "速", "い"]
    assert words_of("\N{FULLWIDTH LATIN CAPITAL LETTER A}bc naïve_x") == ["abc", "naïve", "x"]


def test_the_command_counts_by_file_lists_the_rows_and_exits_1(
    tmp_path: Path, evaluation: Path, capsys: Any
) -> None:
    clean = write(tmp_path / "clean.jsonl", row("c", "nothing"))
    dirty = write(tmp_path / "dirty.jsonl", row("d1", "Nothing"), row("d2", "What is 2 + 2?"))
    other = write(tmp_path / "other.jsonl", row("o", "What is 2+2"), row("p", "Why?"))
    files = ["--evaluation", str(evaluation), str(other)]
    assert main(["train", "overlap", "--data", str(clean), *files]) == 0
    assert f"{clean}: 0 of 1 rows overlap" in capsys.readouterr().out
    assert main(["train", "overlap", "--data", str(clean), str(dirty), *files]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed == [
        f"{dirty} d2 (user) has a turn of {evaluation} short, {other} o: what is 2 2",
        f"{clean}: 0 of 1 rows overlap with evaluation",
        f"{dirty}: 1 of 2 rows overlap with evaluation",
        f"{evaluation}: 1 of 2 prompts are in training",
        f"{other}: 1 of 2 prompts are in training",
    ]


def test_files_that_prove_nothing_are_errors(tmp_path: Path, evaluation: Path, capsys: Any) -> None:
    empty = write(tmp_path / "empty.jsonl")
    with pytest.raises(DataError, match="holds no rows"):
        find_overlaps([evaluation], [empty])
    with pytest.raises(DataError, match="holds no rows"):
        find_overlaps([empty], [evaluation])
    assert main(["train", "overlap", "--data", "nowhere", "--evaluation", str(evaluation)]) == 2
    assert "--data: nowhere is no file" in capsys.readouterr().err
