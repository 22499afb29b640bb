"""The benchmark of the matrices runs every variant on a real model folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import bench.linears
from engine.backends.native.library import kernels
from engine.backends.native.matrix import Kind, NativeLinear
from engine.backends.torch.quantization import Int4Linear
from tests.engine.tiny import CONFIG, save_tiny_model

# The kernels take this one.
WIDE = replace(CONFIG, head_dim=32, intermediate_size=128)


@pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="int8 needs AVX-512 VNNI")
def test_the_last_line_has_every_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny_model(tmp_path, WIDE)
    assert bench.linears.run(str(tmp_path), tokens=[1, 9], repeats=2) == 0
    milliseconds = json.loads(capsys.readouterr().out.splitlines()[-1])["milliseconds"]
    formats = ["bfloat16", "int8", "int4"]
    by_torch = [f"{name}, torch" for name in formats]
    assert list(milliseconds) == ([] if kernels() is None else formats) + by_torch
    for row in milliseconds.values():
        assert list(row) == ["1", "9"]
        assert all(0 < layers < 1000 and 0 < lm_head < 1000 for layers, lm_head in row.values())


def test_variants_are_what_they_are_called(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, WIDE)
    by_torch = bench.linears.load(tmp_path, "int4", False)
    assert by_torch is not None
    assert any(isinstance(module, Int4Linear) for _, module in by_torch.layers)
    if kernels() is not None:
        native = bench.linears.load(tmp_path, "int4", True)
        assert native is not None
        kinds = {module.kind for _, module in native.layers if isinstance(module, NativeLinear)}
        assert kinds == {Kind.INT4} and len(native.layers) == len(by_torch.layers)
