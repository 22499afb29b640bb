"""A run shared by two processes computes what one process does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.errors import ConfigError
from tests.training.tiny_checkpoint import save_checkpoint
from training.devices import make_accelerator

pytest.importorskip("peft", reason="needs gorgon-serve[train]")
ROOT = Path(__file__).parent.parent.parent
LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def run(launch: list[str], worker: str, *folders: Path) -> tuple[str, torch.Tensor]:
    """What it printed, and the losses of the log in the last folder."""
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *launch, "-m", f"tests.training.{worker}", *map(str, folders)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    header, *rows = (folders[-1] / "log.csv").read_text().splitlines()
    losses = [i for i, name in enumerate(header.split(",")) if name.startswith("loss_")]
    return done.stdout, torch.tensor([[float(row.split(",")[i]) for i in losses] for row in rows])


@pytest.mark.slow
def test_two_processes_train_jointly_what_one_does(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "model", tied=False)
    said, one = run([], "joint_worker", checkpoint, tmp_path / "one")
    assert "1 processes" in said
    said, two = run(LAUNCH, "joint_worker", checkpoint, tmp_path / "two")
    assert said.count("2 processes") == 2
    assert len(one) > 6
    torch.testing.assert_close(two, one, rtol=1e-2, atol=1e-3)


@pytest.mark.slow
def test_two_processes_train_heads_as_one_does(tmp_path: Path) -> None:
    said, one = run([], "heads_worker", tmp_path / "one")
    assert "1 processes" in said
    said, two = run(LAUNCH, "heads_worker", tmp_path / "two")
    assert said.count("2 processes") == 2
    assert len(one) > 3
    assert said.count("step 3/") == 1  # told by one of them
    torch.testing.assert_close(two, one, rtol=2e-2, atol=2e-2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="no CUDA device"):
        make_accelerator(device="cuda")
