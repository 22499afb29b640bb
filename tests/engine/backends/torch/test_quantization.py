"""Quantized layers multiply as their numbers say, each row by itself, however many rows come together."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.backends.torch.quantization import (
    Int4Linear,
    Int8Linear,
    fits_int4,
    int4_error,
    quantize_int4,
    quantize_int8,
)

needs_vnni = pytest.mark.skipif(
    not torch.cpu._is_vnni_supported(), reason="without AVX-512 VNNI, sums of 8-bit products saturate"
)
ROWS = 40
SHAPES = [(64, 96), (48, 64), (960, 576)]  # [out, in]


def weights(out_features: int, in_features: int) -> Tensor:
    generator = torch.Generator().manual_seed(out_features)
    return (0.1 * torch.randn(out_features, in_features, generator=generator)).bfloat16()


def inputs(in_features: int) -> Tensor:
    """Rows of very different size, one of them zero."""
    x = torch.randn(ROWS, in_features, generator=torch.Generator().manual_seed(1))
    x *= torch.logspace(-3, 3, ROWS).unsqueeze(1)
    x[5] = 0.0
    return x.bfloat16()


def in_parts(layer: torch.nn.Module, x: Tensor, size: int) -> Tensor:
    return torch.cat([layer(part) for part in x.split(size)])


@needs_vnni
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("keep_copy", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, (100, 36)], ids=str)
def test_int8_is_the_product_of_the_rounded_numbers(
    shape: tuple[int, int], keep_copy: bool, bias: bool
) -> None:
    weight, x = weights(*shape), inputs(shape[1])
    offset = weights(1, shape[0])[0] if bias else None
    codes, scales = quantize_int8(weight)
    largest = x.double().abs().amax(dim=1, keepdim=True)
    rounded = (x.double() * 127 / largest.clamp_min(1e-30)).round()
    expected = rounded @ codes.double().t() * scales.double() * largest / 127
    added = torch.zeros(1).double() if offset is None else offset.double()
    y = Int8Linear(weight, offset, keep_copy=keep_copy)(x)
    # bfloat16 rounds three times, by at most 2**-8; and one code of each row may have rounded the other way.
    tolerance = 2.0**-6 * (expected.abs() + added.abs()) + largest * scales.double()
    assert ((y.double() - expected - added).abs() <= tolerance).all()
    exact = x.double() @ weight.double().t() + added
    error = (y.double() - exact).norm(dim=1) / exact.norm(dim=1).clamp_min(1e-30)
    assert error.max() < 0.03  # steps of 1/127 of a row's largest number, in weights and activations


@needs_vnni
@pytest.mark.parametrize("keep_copy", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, (100, 36)], ids=str)
def test_int8_gives_a_row_the_same_numbers_in_any_company(shape: tuple[int, int], keep_copy: bool) -> None:
    layer, x = Int8Linear(weights(*shape), keep_copy=keep_copy), inputs(shape[1])
    y = layer(x)
    for size in (1, 2, 7, 17):
        assert torch.equal(in_parts(layer, x, size), y)
    louder = x.clone()
    louder[1:] *= 1000
    assert torch.equal(layer(louder)[0], y[0])


@needs_vnni
def test_int8_keeps_rows_that_are_not_numbers_to_themselves() -> None:
    layer, x = Int8Linear(weights(64, 96)), inputs(96)
    y = layer(x)
    x[3, 4] = float("nan")
    broken = layer(x)
    assert broken[3].isnan().all()
    assert torch.equal(broken[4:], y[4:]) and not y[5].any()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int4_is_the_product_with_the_rounded_weights(shape: tuple[int, int]) -> None:
    weight, x = weights(*shape), inputs(shape[1])
    codes, scales, offsets = quantize_int4(weight)
    rounded = (codes * scales.unsqueeze(-1) + offsets.unsqueeze(-1)).flatten(1)
    assert float((rounded - weight.float()).abs().max()) <= 0.51 * float(scales.max())
    expected = x.double() @ rounded.double().t()
    for keep_copy in (True, False):
        layer = Int4Linear(weight, keep_copy=keep_copy)
        for size in (1, 3, ROWS):  # by the int4 operator, and by the copy where there is one
            error = (in_parts(layer, x, size).double() - expected).norm(dim=1)
            assert (error / expected.norm(dim=1).clamp_min(1e-30)).max() < 0.01


def test_int4_gives_a_row_the_same_numbers_beside_any_others() -> None:
    layer, x = Int4Linear(weights(64, 96)), inputs(96)
    for rows in (1, 5, 8, ROWS):
        y, louder = layer(x[:rows]), x[:rows].clone()
        louder[1:] *= 1000
        assert torch.equal(layer(louder)[0], y[0])
    assert torch.equal(in_parts(layer, x, 1), in_parts(layer, x, 5))


def test_int4_adds_its_bias() -> None:
    bias = weights(1, 64)[0]
    with_bias, without = Int4Linear(weights(64, 96), bias), Int4Linear(weights(64, 96))
    for rows in (2, ROWS):
        x = inputs(96)[:rows]
        torch.testing.assert_close(with_bias(x), without(x) + bias, rtol=0.01, atol=0.01)
    assert torch.equal(with_bias(inputs(96)[5:6])[0], bias)


def test_weights_that_were_stored_in_4_bits_find_their_codes_again() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(16, (64, 3, 32), generator=generator)
    codes[..., 0], codes[..., 1] = 0, 15  # as GGUF writes them: the ends of a group's range are in use
    scales = 0.01 + 0.01 * torch.rand(64, 3, 1, generator=generator)
    stored = (codes * scales - 8 * scales).flatten(1).bfloat16()
    assert torch.equal(quantize_int4(stored)[0], codes.float())
    assert int4_error(stored) < 0.005
    assert int4_error(weights(64, 96)) > 0.05


def test_weights_that_are_all_alike_stay_so() -> None:
    for value in (0.0, 0.25):
        weight = torch.full((16, 32), value).bfloat16()
        y = Int4Linear(weight)(torch.ones(1, 32).bfloat16())
        assert torch.equal(y, torch.full((1, 16), 32 * value).bfloat16())


def test_shapes_that_the_int4_operator_takes() -> None:
    assert fits_int4(torch.empty(48, 64))
    assert not fits_int4(torch.empty(48, 36)) and not fits_int4(torch.empty(40, 64))


@pytest.mark.parametrize("levels", [15, 14, 10])
def test_what_was_stored_in_4_bits_finds_its_codes_again(levels: int) -> None:
    codes = torch.randint(levels + 1, (64, 3, 32), generator=torch.Generator().manual_seed(0)).float()
    codes[..., 0], codes[..., 1] = 0, levels  # as GGUF's Q4_K has groups: not all use all sixteen
    found, scales, offsets = quantize_int4((codes * 0.5 - 3).flatten(1))
    assert torch.equal(found, codes)
    assert torch.allclose(scales, torch.tensor(0.5)) and torch.equal(offsets, torch.full_like(offsets, -3))
