"""Prompts are sampled evenly over tasks, the same ones for the same seed."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from bench.prompts import BUILTIN, read_prompts, sample
from engine.errors import ConfigError


def write(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def row(number: int, task: str) -> dict[str, object]:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": f"question {number}"}]
    return {"id": number, "task": task, "messages": [*messages, {"role": "user", "content": "and then?"}]}


def test_the_first_user_turn_is_asked(tmp_path: Path) -> None:
    [prompt] = read_prompts(write(tmp_path / "p.jsonl", [row(1, "qa")]))
    assert (prompt.id, prompt.task) == ("1", "qa")
    assert prompt.messages == [{"role": "user", "content": "question 1"}]


def test_tasks_are_sampled_evenly(tmp_path: Path) -> None:
    rows: list[object] = [row(i, "common") for i in range(20)]
    rows += [row(100 + i, "rare") for i in range(5)] + [row(200, "single")]
    prompts = read_prompts(write(tmp_path / "p.jsonl", rows))
    assert Counter(p.task for p in sample(prompts, 7, seed=0)) == {"common": 3, "rare": 3, "single": 1}
    assert len({p.id for p in sample(prompts, 26, seed=0)}) == 26
    assert sample(prompts, 7, seed=0) == sample(prompts, 7, seed=0) != sample(prompts, 7, seed=1)


def test_more_than_there_are_is_an_error(tmp_path: Path) -> None:
    prompts = read_prompts(write(tmp_path / "p.jsonl", [row(1, "qa")]))
    with pytest.raises(ConfigError, match="--num-prompts: must be 1 to 1"):
        sample(prompts, 2, seed=0)


@pytest.mark.parametrize("line", ["{", "[]", '{"messages": []}', '{"messages": [{"role": "user"}]}', "3"])
def test_a_bad_line_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(row(1, "qa")) + "\n\n" + line + "\n")
    with pytest.raises(ConfigError, match=r"p\.jsonl:3 holds no"):
        read_prompts(path)


def test_missing_and_empty_files_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_prompts(tmp_path / "none.jsonl")
    with pytest.raises(ConfigError, match="holds no prompts"):
        read_prompts(write(tmp_path / "p.jsonl", []))


def test_our_own_prompts_have_even_tasks() -> None:
    assert set(Counter(p.task for p in read_prompts(BUILTIN)).values()) == {4}
