"""Each matrix gets the smallest format that keeps what its file says: by rule, not by a measurement."""

from __future__ import annotations

import gguf
import pytest
import torch
from torch import Tensor

from engine.backends.native.library import kernels
from engine.backends.native.matrix import Kind, NativeLinear
from engine.backends.native.precision import choose_kind, take_over
from engine.backends.torch.precision import MAX_ERROR
from engine.config import Quantization
from tests.engine.backends.native.decoders import WIDE, random_decoder

pytestmark = pytest.mark.skipif(kernels() is None, reason="no AVX-512 VNNI and BF16, or no C compiler")


def random(rows: int = 64, columns: int = 96) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).bfloat16()


def in_4_bits(weight: Tensor, levels: int = 15) -> Tensor:
    groups = weight.float().view(len(weight), -1, 32)
    lowest, highest = groups.amin(dim=-1, keepdim=True), groups.amax(dim=-1, keepdim=True)
    scale = (highest - lowest) / levels
    return ((groups - lowest).div(scale).round() * scale + lowest).flatten(1).bfloat16()


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        (in_4_bits(random()), Kind.INT4),
        (in_4_bits(random(), levels=14), Kind.INT4),  # as Q4_K leaves many groups
        (random(), Kind.INT8),
    ],
)
def test_auto_takes_the_smallest_format_that_keeps_a_matrix(weight: Tensor, expected: Kind) -> None:
    assert choose_kind("down", weight, "auto") == expected
    assert choose_kind("lm_head", weight, "auto") == Kind.INT8


@pytest.mark.parametrize(
    ("stored", "expected"),
    [("Q4_0", Kind.INT4), ("Q4_1", Kind.INT4), ("Q5_0", Kind.INT8), ("Q5_1", Kind.INT8), ("Q8_0", Kind.INT8)],
)
def test_what_a_gguf_file_stores_in_4_bits_stays_in_4(stored: str, expected: Kind) -> None:
    kind = gguf.GGMLQuantizationType[stored]
    packed = gguf.quants.quantize(random(96, 128).float().numpy(), kind)
    assert (
        choose_kind("down", torch.from_numpy(gguf.quants.dequantize(packed, kind)).bfloat16(), "auto")
        == expected
    )


def test_a_matrix_that_8_bits_would_change_keeps_its_16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.backends.native.precision.int8_error", lambda weight: 1.01 * MAX_ERROR)
    assert choose_kind("down", random(), "auto") == Kind.BF16
    assert choose_kind("down", random(), "int8") == Kind.INT8


@pytest.mark.parametrize(("asked", "kind"), [("none", Kind.BF16), ("int8", Kind.INT8), ("int4", Kind.INT4)])
def test_what_is_asked_for_is_had_whatever_it_changes(asked: Quantization, kind: Kind) -> None:
    assert choose_kind("down", random(), asked) == kind


def test_twenty_starts_give_the_same_formats_without_a_look_at_a_clock(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_clock() -> float:
        raise AssertionError("the choice must not depend on a timing")

    for name in ("perf_counter", "monotonic", "time", "process_time"):
        monkeypatch.setattr(f"time.{name}", no_clock)
    found = set()
    for _ in range(20):
        decoder = random_decoder(WIDE)
        for layer in decoder.layers:
            layer.down.weight.data = in_4_bits(layer.down.weight)  # type: ignore[union-attr, operator]
        native, name = take_over(decoder, "auto")
        assert name == "int8+int4"
        found.add(tuple(m.kind for m in native.modules() if isinstance(m, NativeLinear)))
    [kinds] = found
    assert kinds.count(Kind.INT4) == len(native.layers) // 4
