"""`gorgon distill`: every row is answered once or its failure is counted, and a killed run loses nothing."""

from __future__ import annotations

import gzip
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cli.main import main
from engine.errors import ConfigError
from tests.training.tiny_chat import CharTokenizer, ScriptedEngine, save_tiny_chat_model
from training.conversation import Prompt, Sampling, choose, read_prompts
from training.dataset import DataError, read_rows
from training.distill import Distiller, Totals
from training.distill_files import DistillFiles, failed_path

NUM_PROMPTS = 30
GREEDY = Sampling(max_tokens=8, temperature=0.0, greedy_share=0.0, seed=0)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    save_tiny_chat_model(folder)
    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    rows: list[dict[str, Any]] = [
        {"id": f"q{i}", "category": "abc"[i % 3], "messages": [user(f"What is {i * 37}?")]}
        for i in range(NUM_PROMPTS - 2)
    ]
    rows.insert(3, {"id": "long", "messages": [user("x" * 300)]})
    rows.insert(5, {"id": "bad", "messages": [user("refused")]})
    return write(tmp_path / "prompts.jsonl", rows)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command(model_dir: Path, prompts: Path, out: Path, *flags: str) -> list[str]:
    paths = ["distill", "--model", str(model_dir), "--prompts", str(prompts), "--out", str(out)]
    engine = ["--dtype", "float32", "--device", "cpu", "--kv-cache-memory", "4M", "--concurrency", "2"]
    return [*paths, *engine, "--max-tokens", "60", *flags]


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


@pytest.mark.parametrize(
    "flags", [(), ("--temperature", "0.9", "--greedy-share", "0.5")], ids=["greedy", "mixed"]
)
def test_a_killed_run_goes_on_to_the_same_file(
    model_dir: Path, prompts: Path, tmp_path: Path, flags: tuple[str, ...], capsys: Any
) -> None:
    whole, broken = tmp_path / "whole" / "a.jsonl", tmp_path / "broken" / "a.jsonl"
    assert main(command(model_dir, prompts, whole, *flags)) == 0
    process = subprocess.Popen(
        [sys.executable, "-m", "cli.main", *command(model_dir, prompts, broken, *flags)],
        stdout=subprocess.DEVNULL,
    )
    partial = broken.with_name("a.partial.jsonl")
    deadline = time.monotonic() + 120
    while not partial.exists() or partial.read_bytes().count(b"\n") < 3:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = partial.read_bytes()
    kept = kept[: kept.rindex(b"\n") + 1]
    assert 3 <= kept.count(b"\n") < NUM_PROMPTS - 2 and not broken.exists()
    partial.write_bytes(kept + b'{"id": "q9", "mess')  # as if it had been killed while writing
    capsys.readouterr()
    assert main(command(model_dir, prompts, broken, *flags)) == 0
    assert f"{kept.count(chr(10).encode())} rows of a.jsonl are there" in capsys.readouterr().out
    assert broken.read_bytes() == whole.read_bytes()
    assert not partial.exists()


def test_rows_carry_what_training_reads_and_the_summary_counts(
    model_dir: Path, prompts: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "a.jsonl.gz"
    flags = ("--temperature", "1", "--greedy-share", "0.5", "--seed", "3")
    assert main(command(model_dir, prompts, out, *flags)) == 0
    rows = list(read_rows(out))
    asked = [prompt.id for prompt in read_prompts(prompts) if prompt.id not in ("long", "bad")]
    assert [row["id"] for row in rows] == asked
    for row in rows:
        assert [m["role"] for m in row["messages"]] == ["user", "assistant"]
        assert row["finish_reason"] in ("stop", "length") and 1 <= row["tokens"] <= 60
        assert row["category"] in "abc"
    greedy = sum(row["temperature"] == 0.0 for row in rows)
    assert 0 < greedy < len(rows) and {row["temperature"] for row in rows} == {0.0, 1.0}
    printed = capsys.readouterr().out
    tokens = sum(row["tokens"] for row in rows)
    assert f"{len(rows)} rows, {tokens} answer tokens, {100 * greedy / len(rows):.1f}% of rows" in printed
    assert "1 prompt too long" in printed and "1 template error" in printed
    assert f"gorgon train medusa1 --model {model_dir} --data {out}" in printed
    failed = [json.loads(line) for line in failed_path(out).read_text().splitlines()]
    assert {(row["id"], row["reason"]) for row in failed} == {
        ("long", "prompt too long"),
        ("bad", "template error"),
    }
    header, *lines = (tmp_path / "a.log.csv").read_text().splitlines()
    last = dict(zip(header.split(","), lines[-1].split(","), strict=True))
    assert (last["rows"], last["failed"], last["tokens"]) == (str(len(rows)), "2", str(tokens))


def test_more_prompts_add_rows_and_leave_the_others(model_dir: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl.gz"
    assert main(command(model_dir, prompts, out, "--num-prompts", "5")) == 0
    few = {row["id"]: row for row in read_rows(out)}
    assert main(command(model_dir, prompts, out, "--num-prompts", "12")) == 0
    more = {row["id"]: row for row in read_rows(out)}
    assert len(few) <= 5 < len(more) <= 12
    assert {name: more[name] for name in few} == few


def test_other_settings_on_the_same_file_are_refused(
    model_dir: Path, prompts: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "a.jsonl"
    assert main(command(model_dir, prompts, out, "--num-prompts", "2")) == 0
    before = out.read_bytes()
    assert main(command(model_dir, prompts, out, "--seed", "1")) == 2
    error = capsys.readouterr().err
    assert "other settings (seed 0 then, 1 now)" in error and error.count("\n") == 1
    assert out.read_bytes() == before


def test_an_output_of_another_program_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    out.write_text("precious\n")
    with pytest.raises(ConfigError, match="not made by gorgon distill"):
        DistillFiles(out, {}, {})
    assert out.read_text() == "precious\n"


def test_two_runs_do_not_write_one_file(tmp_path: Path) -> None:
    with (
        DistillFiles(tmp_path / "a.jsonl", {}, {}),
        pytest.raises(ConfigError, match="another process is writing"),
    ):
        DistillFiles(tmp_path / "a.jsonl", {}, {})


def test_user_turns_are_answered_one_after_the_other_on_the_models_own_answers(tmp_path: Path) -> None:
    chat = [user("hi"), user("so?"), assistant("what somebody else said"), user("bye")]
    script = {
        "<u>hi": ("yes", "stop"),
        "<u>hi<a>yes<u>so?": ("no", "stop"),
        "<u>hi<a>yes<u>so?<a>no<u>bye": ("ciao", "stop"),
    }
    path = write(tmp_path / "prompts.jsonl", [{"messages": chat}])
    [row], failed, totals, _ = scripted(tmp_path, read_prompts(path), script)
    assert [m["content"] for m in row["messages"]] == ["hi", "yes", "so?", "no", "bye", "ciao"]
    assert (row["id"], row["tokens"], row["finish_reason"]) == ("0", 4 + 3 + 5, "stop")
    assert not failed and totals.tokens == 12


def test_an_answer_the_prompts_end_with_is_written_anew(tmp_path: Path) -> None:
    path = write(tmp_path / "prompts.jsonl", [{"messages": [user("hi"), assistant("old")]}])
    [row], *_ = scripted(tmp_path, read_prompts(path), {"<u>hi": ("new", "stop")})
    assert row["messages"] == [user("hi"), assistant("new")]


def test_a_conversation_ends_with_an_answer_that_was_cut(tmp_path: Path) -> None:
    prompt = Prompt("a", None, [user("hi"), user("so?")])
    [row], failed, *_ = scripted(tmp_path, [prompt], {"<u>hi": ("yes\N{REPLACEMENT CHARACTER}", "length")})
    assert row["messages"] == [user("hi"), assistant("yes")]
    assert (row["finish_reason"], row["tokens"]) == ("length", 4) and not failed


def test_every_failure_is_written_with_its_reason(tmp_path: Path) -> None:
    prompts = [
        Prompt("empty", "c", [user("e")]),
        Prompt("lost", None, [user("l")]),
        Prompt("long", None, [user("x" * 50)]),
        Prompt("nobody", None, [{"role": "system", "content": "s"}]),
        Prompt("tool", None, [user("t"), {"role": "tool", "content": "42"}]),
        Prompt("fine", None, [user("f")]),
    ]
    script = {
        "<u>e": (" ", "stop"),
        "<u>l": ("half", "abort"),
        "<u>t": ("calls", "stop"),
        "<u>f": ("fine", "stop"),
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
    script = {f"<u>{i}": ("x" * (i % 4 + 1), "stop") for i in range(9)}
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


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-tokens", "0"], "--max-tokens: must be at least 1"),
        (["--concurrency", "0"], "--concurrency: must be at least 1"),
        (["--num-prompts", "0"], "--num-prompts: must be at least 1"),
        (["--temperature", "-1"], "--temperature: must be 0 to 2"),
        (["--temperature", "1", "--greedy-share", "1.5"], "--greedy-share: must be 0 to 1"),
        (["--greedy-share", "0.5"], "at temperature 0 all rows are greedy"),
        (["--out", "a.txt"], "--out: a.txt must end with .jsonl"),
        (["--prompts", "nowhere.jsonl"], "--prompts: nowhere.jsonl is no file"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_loaded(
    flags: list[str], message: str, prompts: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr("heads.registry.resolve_model", lambda name: pytest.fail("fetched"))
    argv = ["distill", "--prompts", str(prompts), "--out", str(tmp_path / "a.jsonl"), *flags]
    assert main(argv) == 2
    assert message in capsys.readouterr().err
