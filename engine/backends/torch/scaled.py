"""Linear layers with int8 and fp8 weights by torch's scaled products, which GPUs have units for.

Weights have a scale per output. Activations are quantized row by row, so that a row's codes never depend on
its neighbours; int8 sums are whole numbers and come out the same whatever a token is batched with. The same
operators run on CPUs, where nothing is gained by them: that is how they are tested without a GPU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.backends.torch.quantization import quantize_int8

FP8 = torch.float8_e4m3fn
FP8_CAPABILITY = (8, 9)  # of the first GPUs that multiply in fp8
_INT8_LEVELS, _FP8_LEVELS = 127.0, torch.finfo(FP8).max
_LEAST_ROWS = 32  # cuBLAS takes no fewer than 17 rows of int8
_MULTIPLE = 16  # of both sizes of a weight that the products take
_TINY = 1e-12  # a scale for rows that are all zero


class ScaledInt8Linear(nn.Module):
    """weight: [out, in] as `fits_scaled` allows, on any device."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self._codes, self._scales = quantize_int8(weight)
        self._bias = None if bias is None else bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """x: [num_rows, in] -> [num_rows, out]"""
        rows = len(x)
        values = x.float()
        scales = values.abs().amax(dim=-1, keepdim=True).clamp_min_(_TINY) / _INT8_LEVELS
        codes = values.div(scales).round_().to(torch.int8)
        if rows < _LEAST_ROWS:
            codes = F.pad(codes, (0, 0, 0, _LEAST_ROWS - rows))
        sums = torch._int_mm(codes, self._codes.t())[:rows]
        y = sums.float().mul_(scales).mul_(self._scales).to(x.dtype)
        return y if self._bias is None else y.add_(self._bias)


class ScaledFP8Linear(nn.Module):
    """weight: [out, in] bfloat16 as `fits_scaled` allows, on any device.

    Sums stay in the tensor cores, which keep some 22 bits of them (fast accumulation): so do vLLM's kernels,
    torchao and Transformer Engine for inference. Without it Hopper's products of rows that have scales of
    their own are much slower, and what it costs is far below what rounding the factors to fp8 does.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        codes, scales = quantize_fp8(weight.detach())
        self._codes, self._scales = codes, scales.t()  # [out, in], [1, out]
        self._bias = None if bias is None else bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """x: [num_rows, in] -> [num_rows, out]"""
        codes, scales = quantize_fp8(x)
        y = torch._scaled_mm(
            codes,
            self._codes.t(),
            scale_a=scales,
            scale_b=self._scales,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        ).to(x.dtype)
        return y if self._bias is None else y.add_(self._bias)


def fits_scaled(weight: Tensor) -> bool:
    """Whether the products take weights [out, in] of this shape."""
    return all(size % _MULTIPLE == 0 for size in weight.shape)


def quantize_fp8(values: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of rows [num_rows, size], and the scale of each, [num_rows, 1] float32; a row's largest value is
    fp8's largest number."""
    values = values.float()
    scales = values.abs().amax(dim=-1, keepdim=True).clamp_min_(_TINY) / _FP8_LEVELS
    # Division may land a hair beyond the largest number, of which a device may make NaN.
    return values.div(scales).clamp_(-_FP8_LEVELS, _FP8_LEVELS).to(FP8), scales
