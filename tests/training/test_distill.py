"""`gorgon distill`: every row is answered once or its failure is counted, and a killed run loses nothing."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from cli.main import main
from engine.model.loader import load_decoder
from engine.text.tokenizer import load_chat_tokenizer
from heads.checkpoint import save_heads
from heads.medusa import MedusaHeads
from tests.engine.families import full
from tests.engine.tiny import VOCAB
from tests.training.tiny_chat import save_tiny_chat_model, user, write
from training.conversation import read_prompts
from training.dataset import load_documents, read_rows
from training.distill_files import failed_path

NUM_PROMPTS = 30


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


def command(model_dir: Path, prompts: Path, out: Path, *flags: str) -> list[str]:
    paths = ["distill", "--model", str(model_dir), "--prompts", str(prompts), "--out", str(out)]
    engine = ["--dtype", "float32", "--device", "cpu", "--kv-cache-memory", "4M", "--concurrency", "2"]
    return [*paths, *engine, "--max-tokens", "60", *flags]


def wait_for_rows(process: subprocess.Popen[Any], partial: Path, number: int) -> None:
    deadline = time.monotonic() + 120
    while not partial.exists() or partial.read_bytes().count(b"\n") < number:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.002)


def test_a_killed_run_goes_on_to_the_same_file(
    model_dir: Path, prompts: Path, tmp_path: Path, capsys: Any
) -> None:
    flags = ("--temperature", "0.9", "--greedy-share", "0.5")
    whole, broken = tmp_path / "whole" / "a.jsonl", tmp_path / "broken" / "a.jsonl"
    assert main(command(model_dir, prompts, whole, *flags)) == 0
    process = subprocess.Popen(
        [sys.executable, "-m", "cli.main", *command(model_dir, prompts, broken, *flags)],
        stdout=subprocess.DEVNULL,
    )
    partial = broken.with_name("a.partial.jsonl")
    wait_for_rows(process, partial, 3)
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
    assert f"gorgon train heads --model {model_dir} --data {out}" in printed
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


def test_a_model_that_has_changed_is_told_apart(
    model_dir: Path, prompts: Path, tmp_path: Path, capsys: Any
) -> None:
    model = shutil.copytree(model_dir, tmp_path / "model")
    argv = command(model, prompts, tmp_path / "a.jsonl", "--num-prompts", "1", "--max-tokens", "2")
    assert main(argv) == 0
    with (model / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))
    assert main(argv) == 2
    assert "model_sha256" in capsys.readouterr().err


def test_what_could_not_be_answered_is_tried_again(
    model_dir: Path, prompts: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    argv = command(
        model_dir,
        prompts,
        tmp_path / "a.jsonl",
        "--num-prompts",
        "4",
        "--max-tokens",
        "4",
        "--speculation",
        "off",
    )
    with monkeypatch.context() as patch:
        patch.setattr("engine.engine.Engine._run", lambda self, batch: 1 / 0)
        assert main(argv) == 1
    assert "failed: 4 engine error" in capsys.readouterr().out
    assert len(failed_path(tmp_path / "a.jsonl").read_text().splitlines()) == 4
    assert main(argv) == 0
    assert "4 rows, " in capsys.readouterr().out
    assert not failed_path(tmp_path / "a.jsonl").exists()


def test_a_terminated_run_says_how_to_go_on(model_dir: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-m", "cli.main", *command(model_dir, prompts, out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_rows(process, out.with_name("a.partial.jsonl"), 1)
    process.terminate()
    printed, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "")
    assert "the same command goes on" in printed


def test_speculation_leaves_the_rows_as_they_are(model_dir: Path, prompts: Path, tmp_path: Path) -> None:
    heads = tmp_path / "heads"
    decoder = load_decoder(model_dir, torch.float32, torch.device("cpu"))
    save_heads(heads, MedusaHeads(2, 1, 64, VOCAB), "tiny", decoder.embedding)
    full(12, 3, 2).save(heads / "tree.json")
    plain, speculated = tmp_path / "plain.jsonl", tmp_path / "speculated.jsonl"
    flags = ("--num-prompts", "6", "--temperature", "0.8", "--greedy-share", "0.5")
    assert main(command(model_dir, prompts, plain, *flags)) == 0
    assert main(command(model_dir, prompts, speculated, *flags, "--heads", str(heads))) == 0
    assert speculated.read_bytes() == plain.read_bytes()


def test_training_reads_as_many_answer_tokens_as_the_rows_say(
    model_dir: Path, prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "a.jsonl"
    assert main(command(model_dir, prompts, out, "--temperature", "1")) == 0
    rows = list(read_rows(out))
    assert {row["finish_reason"] for row in rows} == {"stop", "length"}
    tokenizer = load_chat_tokenizer(model_dir)
    documents = load_documents(out, tokenizer, "</s>", 10**6, 256, 0)
    assert sum(document.num_answer_tokens for document in documents) == sum(row["tokens"] for row in rows)


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
    monkeypatch.setattr("engine.folders.resolve_model", lambda name: pytest.fail("fetched"))
    argv = ["distill", "--prompts", str(prompts), "--out", str(tmp_path / "a.jsonl"), *flags]
    assert main(argv) == 2
    assert message in capsys.readouterr().err
