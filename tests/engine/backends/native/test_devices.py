"""The kernels are compiled for CPUs alone: a host with a GPU neither waits for that nor needs a compiler."""

from __future__ import annotations

import pytest
import torch

from engine.backends.draws import Draws
from engine.backends.native import attention, matrix, noise

ELSEWHERE = torch.device("meta")  # as good as a GPU: no CPU


def test_nothing_is_compiled_for_tensors_on_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_them() -> None:
        raise AssertionError("the device comes first")

    for module in (attention, matrix, noise):
        monkeypatch.setattr(module, "kernels", compile_them)
    rows = torch.empty(2, 64, device=ELSEWHERE)
    draws = Draws(*(torch.empty(2, device=ELSEWHERE) for _ in range(5)))
    assert not matrix.fits(rows.bfloat16())
    assert matrix.argmax(rows) is None
    assert noise.draw(rows, draws) is None
    assert not attention.reads_cache(rows.bfloat16())
