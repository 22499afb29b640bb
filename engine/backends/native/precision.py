"""Which number format each matrix has in our own kernels: the one asked for, or the smallest that keeps what
the file says."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from engine.backends.native.decoder import NativeDecoder, pack
from engine.backends.native.kept import KeptWeights
from engine.backends.native.matrix import Kind, NativeLinear, fits, int8_error
from engine.backends.torch.packing import fast_linear, replace_linears
from engine.backends.torch.precision import BFLOAT16, MAX_ERROR, name_formats
from engine.backends.torch.quantization import int4_error
from engine.config import Quantization
from engine.model.decoder import Decoder

_NAMES = {Kind.INT4: "int4", Kind.INT8: "int8", Kind.BF16: BFLOAT16}


def take_over(
    decoder: Decoder, asked: Quantization, kept: KeptWeights | None = None
) -> tuple[NativeDecoder, str]:
    """The decoder in our own kernels, which must take it (`engine.backends.native.decoder.can_take`), and
    what was asked for, or what auto came to (`engine.backends.torch.precision.name_formats`).

    The decoder given loses its linear layers. kept: where they may be packed already, or are kept.
    """

    def choose(name: str, weight: Tensor) -> Kind:
        return choose_kind(name, weight, asked)

    replace_linears(decoder, lambda name, linear: pack(name, linear, choose))
    if kept is not None:
        kept.keep(decoder)
    taken = NativeDecoder(decoder, choose)
    if asked != "auto":
        return taken, asked
    linears = [module for module in taken.modules() if isinstance(module, NativeLinear)]
    formats = [(_NAMES[linear.kind], linear.in_features * linear.out_features) for linear in linears]
    return taken, name_formats(formats, "int4, int8 and bfloat16")


def choose_kind(name: str, weight: Tensor, asked: Quantization) -> Kind:
    """Format of one matrix [out, in], by what was asked for the whole model.

    auto: the smallest that changes the matrix by no more than MAX_ERROR. The projection onto the vocabulary
    is never stored in 4 bits: that costs several per cent of perplexity.
    """
    if asked == "none":
        return Kind.BF16
    lossless = asked == "auto"
    if asked != "int8" and name != "lm_head" and (not lossless or int4_error(weight) <= MAX_ERROR):
        return Kind.INT4
    return Kind.INT8 if not lossless or int8_error(weight) <= MAX_ERROR else Kind.BF16


def draft_linear(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """Multiplication by a weight [out, in] of draft heads, as fast as this machine can: guesses need not be
    exact, so that 8 bits do. Results have the dtype of what is multiplied."""
    if weight.dtype != torch.bfloat16 or not fits(weight):
        return fast_linear(weight)
    linear = NativeLinear(weight, None, Kind.INT8)
    return lambda x: linear(x).to(x.dtype)
