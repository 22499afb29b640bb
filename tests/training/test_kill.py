"""Runs that are killed for good, by the system and in the middle of a step, end like unbroken ones."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.training.tiny_checkpoint import save_checkpoint, save_text

pytest.importorskip("peft", reason="needs gorgon-serve[train]")
ROOT = Path(__file__).parent.parent.parent
COMMANDS = {
    "medusa1": ["--epochs", "12", "--batch", "64", "--vocab", "16", "--heads", "2", "--lr", "0.01"],
    "medusa2": ["--epochs", "3", "--batch", "4", "--accumulate", "1", "--heads-first-steps", "20"],
}
EVERY = 5  # steps between checkpoints


def start(command: str, checkpoint: Path, data: Path, out: Path) -> subprocess.Popen[str]:
    paths = ["--model", str(checkpoint), "--data", str(data), "--out", str(out)]
    options = [*COMMANDS[command], "--checkpoint-every", str(EVERY), "--device", "cpu"]
    return subprocess.Popen(
        [sys.executable, "-m", "cli.main", "train", command, *paths, *options],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def steps(out: Path) -> list[int]:
    log = out / "log.csv"
    return [int(row.split(",")[0]) for row in log.read_text().splitlines()[1:]] if log.exists() else []


@pytest.mark.slow
@pytest.mark.parametrize("command", list(COMMANDS))
def test_a_run_killed_for_good_ends_like_an_unbroken_one(command: str, tmp_path: Path) -> None:
    checkpoint, data = save_checkpoint(tmp_path / "model"), save_text(tmp_path / "text.jsonl", 150)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    said, _ = start(command, checkpoint, data, whole).communicate()
    assert "gorgon serve" in said, said

    killed = start(command, checkpoint, data, broken)
    while killed.poll() is None and max(steps(broken), default=0) < 2 * EVERY:
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert 2 * EVERY <= max(steps(broken)) < max(steps(whole))
    said, _ = start(command, checkpoint, data, broken).communicate()
    assert "taken up at step" in said, said

    assert steps(broken) == steps(whole)
    files = sorted(file.relative_to(whole) for file in whole.rglob("*.safetensors"))
    assert files == sorted(file.relative_to(broken) for file in broken.rglob("*.safetensors"))
    for file in files:
        one, other = load_file(whole / file), load_file(broken / file)
        assert all(one[name].equal(other[name]) for name in one), file
