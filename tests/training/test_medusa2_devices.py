"""A joint run shared by two processes computes what one process does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.training.tiny_checkpoint import save_checkpoint

pytest.importorskip("peft", reason="needs gorgon-serve[train]")
ROOT = Path(__file__).parent.parent.parent
WORKER = ["-m", "tests.training.joint_worker"]
LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def run(command: list[str], checkpoint: Path, out: Path) -> tuple[str, torch.Tensor]:
    """What it printed, and the losses of its log."""
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command, *WORKER, str(checkpoint), str(out)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = (out / "log.csv").read_text().splitlines()[1:]
    return done.stdout, torch.tensor([[float(x) for x in row.split(",")[1:5]] for row in rows])


@pytest.mark.slow
def test_two_processes_compute_what_one_does(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "model", tied=False)
    said, one = run([], checkpoint, tmp_path / "one")
    assert "1 processes" in said
    said, two = run(LAUNCH, checkpoint, tmp_path / "two")
    assert said.count("2 processes") == 2
    assert len(one) > 6
    torch.testing.assert_close(two, one, rtol=1e-2, atol=1e-3)
