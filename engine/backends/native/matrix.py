"""Weights in the layouts that the kernels read (`kernels/types.h`), and products with them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from enum import IntEnum

import torch
from torch import Tensor, nn

from engine.backends.native.library import CMatrix, kernels
from engine.backends.native.scratch import scratch
from engine.backends.threads import num_threads
from engine.backends.torch.quantization import GROUP_SIZE, change, quantize_int4, quantize_int8
from engine.errors import ConfigError

LANES = 16  # outputs of a block


class Kind(IntEnum):
    """Number format of a matrix: bfloat16; 8 bits with a scale, or 4 bits with a scale and an offset, for
    every 32 inputs of an output. Activations are made 8 bits, too, for the last two."""

    BF16 = 0
    INT4 = 4
    INT8 = 8


# Of 32 weights with their scale and offset.
_GROUP_BYTES = {Kind.BF16: 2 * GROUP_SIZE, Kind.INT4: GROUP_SIZE // 2 + 4, Kind.INT8: GROUP_SIZE + 4}


class NativeLinear(nn.Module):
    """Multiplication by a weight [out, in] of any float type, held in the kernels' layout only.

    bias: [out]. A row's result never depends on the other rows. Raises ConfigError where `fits` says no.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, kind: Kind) -> None:
        super().__init__()
        library = kernels()
        if library is None or not fits(weight):
            raise ConfigError(
                "quantization", f"the CPU kernels do not take weights of shape {tuple(weight.shape)}"
            )
        blocks = _LAYOUTS[kind](weight.detach().float())
        bias = None if bias is None else bias.detach().float().contiguous()
        self._hold(library, blocks, bias, kind, (weight.shape[0], weight.shape[1]))

    @classmethod
    def of_blocks(
        cls, blocks: Tensor, bias: Tensor | None, kind: Kind, shape: tuple[int, int]
    ) -> NativeLinear:
        """The layer that another one's `blocks` and `bias` make. shape: of the weight, [out, in]. Raises
        ValueError where they are not those of such a layer."""
        library, (rows, columns) = kernels(), shape
        if library is None or rows % LANES or columns % GROUP_SIZE:
            raise ValueError(f"the CPU kernels do not take weights of shape {shape}")
        if (
            blocks.dtype != torch.uint8
            or blocks.numel() != rows * (columns // GROUP_SIZE) * _GROUP_BYTES[kind]
        ):
            raise ValueError(f"{blocks.numel()} bytes are no {kind.name} weights of shape {shape}")
        if bias is not None and (bias.dtype != torch.float32 or bias.shape != (rows,)):
            raise ValueError(f"a bias of shape {list(bias.shape)} is none of {rows} outputs")
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made._hold(library, blocks, bias, kind, shape)
        return made

    def _hold(
        self, library: ctypes.CDLL, blocks: Tensor, bias: Tensor | None, kind: Kind, shape: tuple[int, int]
    ) -> None:
        self._library = library
        self.kind = kind
        self.out_features, self.in_features = shape
        self.blocks, self.bias = blocks, bias
        self.c = CMatrix(
            kind=kind,
            inputs=self.in_features,
            outputs=self.out_features,
            blocks=blocks.data_ptr(),
            bias=None if bias is None else bias.data_ptr(),
        )

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.kind.name}"

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in] bfloat16 -> [..., out] float32"""
        rows = x.reshape(-1, self.in_features).to(torch.bfloat16).contiguous()
        out = torch.empty(len(rows), self.out_features)
        threads = num_threads()
        needed = self._library.gorgon_linear_bytes(self.in_features, len(rows), threads)
        self._library.gorgon_linear(
            ctypes.byref(self.c),
            rows.data_ptr(),
            len(rows),
            out.data_ptr(),
            threads,
            scratch.pointer(needed),
        )
        return out.view(*x.shape[:-1], self.out_features)


def fits(weight: Tensor) -> bool:
    """Whether the kernels take weights [out, in] of this shape, on this machine."""
    rows, columns = weight.shape
    right = weight.device.type == "cpu" and rows % LANES == 0 and columns % GROUP_SIZE == 0
    return right and kernels() is not None  # which compiles them: on a host with a GPU nobody waits for that


def argmax(x: Tensor) -> Tensor | None:
    """The first largest entry of each row, [num_rows, width] float32 -> [num_rows] int64; None where the
    kernels do not do it."""
    takes = x.device.type == "cpu" and x.dtype == torch.float32 and x.is_contiguous()
    if not takes or x.shape[1] % LANES or not x.shape[1] or (library := kernels()) is None:
        return None
    places = torch.empty(len(x), dtype=torch.int64)
    library.gorgon_argmax(x.data_ptr(), len(x), x.shape[1], places.data_ptr())
    return places


def quantize_int8_groups(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes -127 to 127, [out, groups, 32] int8, and the scale of each group, [out, groups] float32.

    weight: [out, in]. Weights dequantized from GGUF's Q8_0 find their codes again.
    """
    codes, scales = quantize_int8(weight.reshape(-1, GROUP_SIZE))
    return codes.view(len(weight), -1, GROUP_SIZE), scales.view(len(weight), -1)


def int8_error(weight: Tensor) -> float:
    """Root mean square of what 8 bits change in weight [out, in], relative to that of the weights."""
    codes, scales = quantize_int8_groups(weight)
    return change((codes * scales.unsqueeze(-1)).flatten(1), weight)


def _bf16_blocks(weight: Tensor) -> Tensor:
    rows, columns = weight.shape
    pairs = weight.bfloat16().view(rows // LANES, LANES, columns // 2, 2)
    return pairs.transpose(1, 2).contiguous().view(torch.uint8).flatten()


def _int4_blocks(weight: Tensor) -> Tensor:
    codes, scales, offsets = quantize_int4(weight)
    blocks, groups = len(weight) // LANES, codes.shape[1]
    halves = codes.to(torch.uint8).view(blocks, LANES, groups, 2, 4, 4)  # half, vector, byte
    pairs = halves[:, :, :, 0] | halves[:, :, :, 1] << 4
    packed = pairs.permute(0, 2, 3, 1, 4).reshape(blocks, groups, -1)
    return torch.cat((packed, *(_by_block(x.half()) for x in (scales, offsets))), dim=-1).flatten()


def _int8_blocks(weight: Tensor) -> Tensor:
    codes, scales = quantize_int8_groups(weight)
    blocks, groups = len(weight) // LANES, codes.shape[1]
    unsigned = (codes.to(torch.int16) + 128).to(torch.uint8).view(blocks, LANES, groups, 8, 4)  # vector, byte
    packed = unsigned.permute(0, 2, 3, 1, 4).reshape(blocks, groups, -1)
    return torch.cat((packed, _by_block(scales)), dim=-1).flatten()


def _by_block(values: Tensor) -> Tensor:
    """[out, groups] as bytes, [blocks, groups, 16 values]"""
    rows, groups = values.shape
    return values.view(rows // LANES, LANES, groups).transpose(1, 2).contiguous().view(torch.uint8)


_LAYOUTS: dict[Kind, Callable[[Tensor], Tensor]] = {
    Kind.BF16: _bf16_blocks,
    Kind.INT4: _int4_blocks,
    Kind.INT8: _int8_blocks,
}
