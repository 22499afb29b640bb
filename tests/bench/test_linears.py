"""The benchmark of the matrices runs every variant on a real model folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import bench.linears
from engine.model.packing import PackedLinear
from engine.model.quantization import Int4Linear
from tests.bench.evaluate.tiny import save_model


@pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="int8 needs AVX-512 VNNI")
def test_the_last_line_has_every_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(tmp_path)
    assert bench.linears.run(str(tmp_path), tokens=[1, 9], repeats=2) == 0
    milliseconds = json.loads(capsys.readouterr().out.splitlines()[-1])["milliseconds"]
    assert list(milliseconds) == ["bfloat16", "int8", "int4", "int4, one copy"]
    for row in milliseconds.values():
        assert list(row) == ["1", "9"]
        assert all(0 < layers < 1000 and 0 < lm_head < 1000 for layers, lm_head in row.values())


def test_variants_are_what_they_are_called(tmp_path: Path) -> None:
    save_model(tmp_path)
    twice, once = (bench.linears.load(tmp_path, "int4", copies).layers for copies in (True, False))
    for layers in (twice, once):
        assert any(isinstance(module, Int4Linear) for module in layers.modules())
    assert any(isinstance(module, PackedLinear) for module in twice.modules())
    assert not any(isinstance(module, PackedLinear) for module in once.modules())
