"""The kernels are chosen where they run, and triton is imported nowhere else."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from engine.backends.backend import Place
from engine.backends.triton.support import reads_cache
from tests.engine.tiny import tiny_config


def place_on(device: str, stored: torch.dtype, head_dim: int) -> Place:
    return Place(tiny_config(head_dim=head_dim), torch.device(device), torch.bfloat16, stored, 16)


@pytest.mark.parametrize(
    ("device", "capability", "dtype", "head_dim", "expected"),
    [
        ("cuda", (9, 0), torch.bfloat16, 128, True),
        ("cuda", (8, 0), torch.bfloat16, 96, True),
        ("cuda", (8, 9), torch.float8_e4m3fn, 64, True),
        ("cuda", (8, 0), torch.float8_e4m3fn, 64, False),
        ("cuda", (7, 5), torch.float16, 64, False),
        ("cuda", (9, 0), torch.float64, 64, False),
        ("cuda", (9, 0), torch.bfloat16, 288, False),
        ("cpu", (9, 0), torch.float32, 64, False),
    ],
)
def test_kernels_are_for_gpus_that_can_run_them(
    device: str,
    capability: tuple[int, int],
    dtype: torch.dtype,
    head_dim: int,
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert reads_cache(place_on(device, dtype, head_dim)) is expected
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not reads_cache(place_on(device, dtype, head_dim))


def test_the_engine_runs_without_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from tests.engine.tiny import Arrival, TinyEngine\n"
        "from tests.engine.helpers import params\n"
        "assert TinyEngine().run([Arrival('0', [1, 2, 3], params(2))])['0'].tokens"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
