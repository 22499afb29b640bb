"""What GPUs multiply by, checked on the CPU: scaled int8 and fp8 products against plain arithmetic."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine.backends.torch.packing import replace_linears
from engine.backends.torch.precision import scaled
from engine.backends.torch.scaled import (
    FP8,
    ScaledFP8Linear,
    ScaledInt8Linear,
    fits_scaled,
    quantize_fp8,
)
from engine.config import Quantization
from engine.model.decoder import Decoder
from tests.engine.tiny import CONFIG, VOCAB
from tests.fakes import DenseCausalAttention

KINDS: list[type[ScaledInt8Linear] | type[ScaledFP8Linear]] = [ScaledInt8Linear, ScaledFP8Linear]
ROWS, IN, OUT = 40, 96, 64


def operands(spread: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """x [ROWS, IN], weight [OUT, IN] and bias [OUT], outputs and rows of very different sizes."""
    torch.manual_seed(0)
    x = torch.randn(ROWS, IN) * torch.logspace(-2, 2, ROWS).unsqueeze(1) * spread
    weight = torch.randn(OUT, IN) * torch.logspace(-3, 1, OUT).unsqueeze(1)
    return x.bfloat16(), weight.bfloat16(), torch.randn(OUT).bfloat16()


def meant_int8(values: Tensor) -> Tensor:
    """What a row's codes stand for, in float64."""
    values = values.double()
    scales = values.abs().amax(dim=-1, keepdim=True).clamp_min(1e-12) / 127
    return (values / scales).round() * scales


def meant_fp8(values: Tensor) -> Tensor:
    codes, scales = quantize_fp8(values)
    return codes.double() * scales.double()


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("kind", "meant"), list(zip(KINDS, (meant_int8, meant_fp8), strict=True)))
def test_products_are_those_of_what_the_codes_stand_for(
    kind: type[ScaledInt8Linear], meant: Callable[[Tensor], Tensor], with_bias: bool
) -> None:
    x, weight, bias = operands()
    y = kind(weight, bias if with_bias else None)(x).double()
    expected = meant(x) @ meant(weight).t() + (bias.double() if with_bias else 0.0)
    # Results are bfloat16's; terms may cancel, so that errors are relative to the sizes that were summed.
    sizes = meant(x).abs() @ meant(weight).abs().t() + bias.double().abs()
    assert y.shape == (ROWS, OUT)
    assert float(((y - expected).abs() / sizes).max()) < 2**-7


@pytest.mark.parametrize(("kind", "bound"), list(zip(KINDS, (0.012, 0.04), strict=True)))
def test_results_change_by_what_the_format_leaves_open(kind: type[ScaledInt8Linear], bound: float) -> None:
    x, weight, _ = operands()
    expected = x.float() @ weight.float().t()
    sizes = x.float().norm(dim=1, keepdim=True) * weight.float().norm(dim=1)
    error = ((kind(weight)(x).float() - expected) / sizes).norm() / (expected / sizes).norm()
    assert bound / 10 < float(error) < bound


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_comes_out_the_same_in_any_company(kind: type[ScaledInt8Linear]) -> None:
    x, weight, bias = operands()
    linear = kind(weight, bias)
    together = linear(x)
    for rows in (slice(0, 1), slice(3, 35), slice(ROWS - 1, ROWS)):
        alone = linear(x[rows])
        if kind is ScaledInt8Linear:
            assert torch.equal(alone, together[rows])
        else:
            torch.testing.assert_close(alone, together[rows])


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_and_huge_numbers_make_no_nan(kind: type[ScaledInt8Linear]) -> None:
    x, weight, _ = operands(spread=1e30)
    x[3] = 0.0
    weight[5] = 0.0
    kept = x.clone()
    y = kind(weight)(x)
    assert bool(y.isfinite().all())
    assert not y[3].any() and not y[:, 5].any()
    assert torch.equal(x, kept)


def test_fp8_sums_stay_in_the_tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    product, asked = torch._scaled_mm, []

    def scaled_mm(*factors: Tensor, use_fast_accum: bool = False, **named: Any) -> Tensor:
        asked.append(use_fast_accum)
        return product(*factors, use_fast_accum=use_fast_accum, **named)

    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    x, weight, _ = operands()
    ScaledFP8Linear(weight)(x)
    assert asked == [True]


def test_a_rows_largest_value_is_the_largest_number() -> None:
    codes, scales = quantize_fp8(torch.tensor([[0.5, -2.0, 1e-9], [1e20, 3.0, -1e19]]))
    assert codes.dtype == FP8
    assert codes.float().abs().amax(dim=1).tolist() == [448.0, 448.0]
    assert scales.squeeze(1).tolist() == pytest.approx([2 / 448, 1e20 / 448])


def random_decoder() -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(CONFIG)
    for name, parameter in decoder.named_parameters():
        nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.1)
    return decoder.bfloat16()


@torch.inference_mode()
@pytest.mark.parametrize(("choice", "kind"), list(zip(("int8", "fp8"), KINDS, strict=True)))
def test_a_decoder_of_scaled_layers_stays_near_its_own(choice: Quantization, kind: type[nn.Module]) -> None:
    plain = random_decoder()
    decoder = copy.deepcopy(plain)
    replace_linears(decoder, lambda name, linear: scaled(linear, name, choice))
    assert sum(isinstance(m, kind) for m in decoder.modules()) == 4 * CONFIG.num_layers + (choice == "int8")
    ids, positions = torch.arange(30) * 7 % VOCAB, torch.arange(30)
    logits = [
        model.logits(model(ids, positions, DenseCausalAttention(CONFIG))).float()
        for model in (plain, decoder)
    ]
    error = float((logits[1] - logits[0]).norm() / logits[0].norm())
    assert 0.001 < error < 0.2


def test_shapes_that_the_products_do_not_take_stay_as_they_are() -> None:
    assert fits_scaled(torch.empty(32, 48)) and not fits_scaled(torch.empty(32, 40))
    decoder = random_decoder()
    linear = decoder.layers[0].get_submodule("o")
    linear.weight = nn.Parameter(torch.zeros(60, 64), requires_grad=False)
    assert scaled(linear, "o", "int8") is linear
    assert scaled(decoder.lm_head, "lm_head", "fp8") is decoder.lm_head
