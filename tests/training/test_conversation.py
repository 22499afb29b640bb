"""What is asked and what is kept: turns, cut answers, failures and what seeds decide, with answers given."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from tests.training.tiny_chat import CharTokenizer, ScriptedEngine, assistant, user, write
from training.conversation import Prompt, Sampling, choose, read_prompts
from training.dataset import DataError, read_rows
from training.distill import Distiller, Totals
from training.distill_files import DistillFiles, failed_path

GREEDY = Sampling(max_tokens=8, temperature=0.0, greedy_share=0.0, seed=0)


def scripted(
    tmp_path: Path, prompts: list[Prompt], script: dict[str, tuple[str, str]], at_once: int = 4
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], Totals, ScriptedEngine]:
    """Rows, failures, totals and the engine of a run whose answers are given."""
    out = tmp_path / "out.jsonl"
    engine, totals = ScriptedEngine(script, at_once, max_model_len=50), Totals()
    with DistillFiles(out, {}, {p.id: i for i, p in enumerate(prompts)}) as files:
        distiller = Distiller(engine, CharTokenizer(), files, totals, GREEDY)  # type: ignore[arg-type]
        distiller.run(prompts, lambda committed: None)
        files.finish()
    failures = failed_path(out)
    failed = [json.loads(line) for line in failures.read_text().splitlines()] if failures.exists() else []
    return list(read_rows(out)), failed, totals, engine


def test_user_turns_are_answered_one_after_the_other_on_the_models_own_answers(tmp_path: Path) -> None:
    chat = [user("hi"), user("so?"), assistant("what somebody else said"), user("bye")]
    script = {
        "<u>hi<a>": ("yes", "stop"),
        "<u>hi<a>yes<u>so?<a>": ("no", "stop"),
        "<u>hi<a>yes<u>so?<a>no<u>bye<a>": ("ciao", "stop"),
    }
    path = write(tmp_path / "prompts.jsonl", [{"messages": chat}])
    [row], failed, totals, _ = scripted(tmp_path, read_prompts(path), script)
    assert [m["content"] for m in row["messages"]] == ["hi", "yes", "so?", "no", "bye", "ciao"]
    assert (row["id"], row["tokens"], row["finish_reason"]) == ("0", 4 + 3 + 5, "stop")
    assert not failed and totals.tokens == 12


def test_an_answer_the_prompts_end_with_is_written_anew(tmp_path: Path) -> None:
    path = write(tmp_path / "prompts.jsonl", [{"messages": [user("hi"), assistant("old")]}])
    [row], *_ = scripted(tmp_path, read_prompts(path), {"<u>hi<a>": ("new", "stop")})
    assert row["messages"] == [user("hi"), assistant("new")]


def test_a_conversation_ends_with_an_answer_that_was_cut(tmp_path: Path) -> None:
    prompt = Prompt("a", None, [user("hi"), user("so?")])
    [row], failed, *_ = scripted(tmp_path, [prompt], {"<u>hi<a>": ("yes\N{REPLACEMENT CHARACTER}", "length")})
    assert row["messages"] == [user("hi"), assistant("yes")]
    assert (row["finish_reason"], row["tokens"], row["unasked"]) == ("length", 4, 1) and not failed


def test_a_conversation_ends_where_the_template_rewrites_what_was_said(tmp_path: Path) -> None:
    prompt = Prompt("a", None, [user("hi"), user("so?"), user("and?")])
    [row], failed, totals, _ = scripted(tmp_path, [prompt], {"<u>hi<a>": (" yes ", "stop")})
    assert row["messages"] == [user("hi"), assistant(" yes ")]
    assert (row["finish_reason"], row["unasked"], totals.unasked) == ("stop", 2, 2) and not failed


def test_a_conversation_ends_where_the_context_is_full(tmp_path: Path) -> None:
    prompt = Prompt("a", None, [user("hi"), user("x" * 40)])
    [row], failed, *_ = scripted(tmp_path, [prompt], {"<u>hi<a>": ("yes", "stop")})
    assert row["messages"] == [user("hi"), assistant("yes")]
    assert (row["finish_reason"], row["unasked"]) == ("stop", 1) and not failed


def test_every_failure_is_written_with_its_reason(tmp_path: Path) -> None:
    prompts = [
        Prompt("empty", "c", [user("e")]),
        Prompt("lost", None, [user("l")]),
        Prompt("long", None, [user("x" * 44)]),
        Prompt("nobody", None, [{"role": "system", "content": "s"}]),
        Prompt("tool", None, [user("t"), {"role": "tool", "content": "42"}]),
        Prompt("fine", None, [user("f")]),
    ]
    script = {
        "<u>e<a>": (" ", "stop"),
        "<u>l<a>": ("half", "abort"),
        "<u>t<a>": ("calls", "stop"),
        "<u>f<a>": ("fine", "stop"),
    }
    rows, failed, totals, _ = scripted(tmp_path, prompts, script)
    assert [row["id"] for row in rows] == ["fine"]
    reasons = {row["id"]: row["reason"] for row in failed}
    assert reasons == {
        "empty": "empty answer",
        "lost": "engine error",
        "long": "prompt too long",
        "nobody": "no user turn",
        "tool": "unsupported role",
    }
    assert totals.failures == dict.fromkeys(reasons.values(), 1)
    assert next(row for row in failed if row["id"] == "empty")["category"] == "c"


def test_as_many_run_at_once_as_the_engine_takes(tmp_path: Path) -> None:
    prompts = [Prompt(str(i), None, [user(str(i))]) for i in range(9)]
    script = {f"<u>{i}<a>": ("x" * (i % 4 + 1), "stop") for i in range(9)}
    rows, _, _, engine = scripted(tmp_path, prompts, script, at_once=3)
    assert engine.most_running == 3
    assert [row["id"] for row in rows] == [str(i) for i in range(9)]
    assert len({request.sampling.seed for request in engine.asked}) == 9


def test_the_share_of_greedy_rows_and_the_choice_depend_on_seed_and_id_alone() -> None:
    prompts = [Prompt(str(i), None, [user("q")]) for i in range(400)]
    few, more = choose(prompts, 100, seed=1), choose(prompts, 200, seed=1)
    assert set(map(id, few)) < set(map(id, more))
    assert choose(prompts[::-1], 100, seed=1)[::-1] == few != choose(prompts, 100, seed=2)


def test_rows_of_one_id_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", [{"id": "a", "messages": [user("1")]}] * 2)
    with pytest.raises(DataError, match="line 2 has the id 'a'"):
        read_prompts(path)


def test_prompts_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    torn = tmp_path / "p.jsonl.gz"
    torn.write_bytes(gzip.compress(json.dumps({"messages": [user("1" * 999)]}).encode())[:-9])
    with pytest.raises(DataError, match=r"p\.jsonl\.gz cannot be read"):
        read_prompts(torn)
    with pytest.raises(DataError, match="holds no rows"):
        read_prompts(write(tmp_path / "empty.jsonl", []))
