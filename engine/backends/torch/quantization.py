"""Linear layers with int4 and int8 weights, by torch's own operators for CPUs.

A row's result never depends on its neighbours: activations are quantized row by row, or not at all. Which
operator is the fastest depends on the number of rows; those of one layer multiply by the same weights, so
that a token passed alone and the same token passed in a tree see one model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engine.backends.torch.packing import PackedLinear

GROUP_SIZE = 32  # columns that share a scale and an offset in int4: those of GGUF's Q4 formats
_INT4_LEVELS, _INT8_LEVELS = 15, 127
_FEWER_LEVELS = range(14, 7, -1)  # of groups that were stored in 4 bits without using the outer codes
_SAMPLED_ROWS = 64  # tell which of these a matrix needs
_CLEARLY_LESS = 0.25  # of the squared change: by chance, fewer levels never change that much less
_INT4_OUT_MULTIPLE = 16  # torch's int4 operator takes weights whose rows come in such blocks
# Up to here the int4 operator, which unpacks the weights anew for every few rows, beats bfloat16's.
_FEW_ROWS = 8
_ROWS_HINT = 16  # rows per call that oneDNN lays the weights out for
_TINY = 1e-12  # a scale for weights that are all zero
# In float32, numbers from 2**23 to 2**24 are whole: adding this rounds to the nearest whole number, and
# leaves it, as a two's complement, in the lowest bits.
_ROUND = 1.5 * 2**23
_UNSIGNED_ZERO = 128  # oneDNN is fast for unsigned activations alone: 128 stands for zero


class Int4Linear(nn.Module):
    """Weights of 4 bits in groups of 32 columns, activations as they come.

    weight: [out, in] bfloat16, as `fits_int4` allows; keep_copy: hold what the 4 bits say in bfloat16 too,
    which is faster for passes of more than a few rows and takes 4.5 times as much memory.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, keep_copy: bool = True) -> None:
        super().__init__()
        codes, scales, offsets = quantize_int4(weight)
        # The operator computes (code - 8) * scale + offset.
        scales, offsets = scales.to(weight.dtype), (offsets + 8 * scales).to(weight.dtype)
        self._scales_and_offsets: Tensor = torch.stack((scales, offsets), dim=-1).transpose(0, 1).contiguous()
        self._weight: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.flatten(1).int(), 1)
        self._bias = None if bias is None else bias.detach()
        self._copy: PackedLinear | None = None
        if keep_copy:
            meant = (codes - 8) * scales.float().unsqueeze(-1) + offsets.float().unsqueeze(-1)
            self._copy = PackedLinear(meant.flatten(1).to(weight.dtype), bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: [num_rows, in] -> [num_rows, out]"""
        if self._copy is not None and len(x) > _FEW_ROWS:
            copied: Tensor = self._copy(x)
            return copied
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x, self._weight, GROUP_SIZE, self._scales_and_offsets
        )
        return y if self._bias is None else y.add_(self._bias)


class Int8Linear(nn.Module):
    """Weights of 8 bits with a scale per output, activations quantized to 8 bits row by row.

    Sums are whole numbers, so that both operators give the same result to the last bit. weight: [out, in]
    bfloat16; keep_copy: hold the weights in plain layout too, which is faster for a single row.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, keep_copy: bool = True) -> None:
        super().__init__()
        codes, scales = quantize_int8(weight)
        self._scales = scales / _INT8_LEVELS  # [out]; rows are scaled by their largest value itself
        self._zeros = torch.zeros(len(codes), dtype=torch.int64)
        self._weight: Tensor = torch.ops.onednn.qlinear_prepack(codes, [_ROWS_HINT, codes.shape[1]])
        self._bias = None if bias is None else bias.detach()
        self._copy = codes.t() if keep_copy else None

    def forward(self, x: Tensor) -> Tensor:
        """x: [num_rows, in] -> [num_rows, out]"""
        values = x.float()
        largest = values.abs().amax(dim=-1, keepdim=True)
        # A row of zeros makes NaN here, whose lowest bits are as good as any: it is multiplied by zero below.
        values = values.mul_(_INT8_LEVELS / largest)
        if self._copy is not None and len(x) == 1:
            codes = values.add_(_ROUND).view(torch.int32).to(torch.int8)
            y: Tensor = torch._int_mm(codes, self._copy).mul(self._scales).to(x.dtype)
        else:
            codes = values.add_(_ROUND + _UNSIGNED_ZERO).view(torch.int32).to(torch.uint8)
            y = torch.ops.onednn.qlinear_pointwise(
                codes, 1.0, _UNSIGNED_ZERO, self._weight, self._scales, self._zeros, None, 1.0, 0, x.dtype,
                "none", [], "",
            )  # fmt: skip
        y = y.mul_(largest)
        return y if self._bias is None else y.add_(self._bias)


def fits_int4(weight: Tensor) -> bool:
    """Whether torch's int4 operator takes weights [out, in] of this shape."""
    rows, columns = weight.shape
    return columns % GROUP_SIZE == 0 and rows % _INT4_OUT_MULTIPLE == 0


def quantize_int4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes 0 to 15, [out, groups, 32], and the scale and offset of each group, [out, groups]; all float32.

    weight: [out, in]. A weight is code * scale + offset; the smallest and the largest of a group are exact,
    so that weights which were dequantized from GGUF's Q4_1 find their codes again; those from Q4_K and
    Q4_0, too, where groups leave some of the 16 codes without use.
    """
    groups = weight.detach().float().view(len(weight), -1, GROUP_SIZE)
    lowest, highest = groups.amin(dim=-1), groups.amax(dim=-1)
    scales = ((highest - lowest) / _INT4_LEVELS).clamp_min_(_TINY)
    codes, errors = _codes(groups, scales, lowest)
    every = slice(None, None, max(1, len(groups) // _SAMPLED_ROWS))
    for levels in _FEWER_LEVELS:
        fewer = ((highest - lowest) / levels).clamp_min_(_TINY)
        if not (_codes(groups[every], fewer[every], lowest[every])[1] < _CLEARLY_LESS * errors[every]).any():
            continue
        found, changes = _codes(groups, fewer, lowest)
        better = changes < _CLEARLY_LESS * errors
        scales, errors = torch.where(better, fewer, scales), torch.where(better, changes, errors)
        codes = torch.where(better.unsqueeze(-1), found, codes)
    return codes, scales, lowest


def _codes(groups: Tensor, scales: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest codes, [out, groups, 32], and the sum of squares that they change, [out, groups]."""
    steps = (groups - offsets.unsqueeze(-1)).div_(scales.unsqueeze(-1))
    codes = steps.round()
    return codes, steps.sub_(codes).square_().sum(dim=-1).mul_(scales.square())


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes -127 to 127 as [out, in] int8 and the scale of each output, [out] float32. weight: [out, in]."""
    values = weight.detach().float()
    scales = (values.abs().amax(dim=1) / _INT8_LEVELS).clamp_min_(_TINY)
    return values.div(scales.unsqueeze(1)).round_().to(torch.int8), scales


def int4_error(weight: Tensor) -> float:
    """Root mean square of what int4 changes in weight [out, in], relative to that of the weights."""
    codes, scales, offsets = quantize_int4(weight)
    return change(codes.mul_(scales.unsqueeze(-1)).add_(offsets.unsqueeze(-1)).flatten(1), weight)


def change(meant: Tensor, weight: Tensor) -> float:
    """Root mean square of the difference of two [out, in], relative to that of the weights."""
    values = weight.detach().float()
    return float((meant - values).norm() / values.norm().clamp_min(_TINY))
