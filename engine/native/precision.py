"""Which number format each matrix has in our own kernels: the one asked for, or the fastest that keeps what
the file says."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from engine.config import Quantization
from engine.model.decoder import Decoder, Linear
from engine.model.packing import fast_linear
from engine.model.precision import MAX_ERROR, describe, fastest, measure
from engine.model.quantization import int4_error
from engine.native.decoder import NativeDecoder
from engine.native.matrix import Kind, NativeLinear, fits, int8_error

logger = logging.getLogger(__name__)

_AUTO: tuple[Quantization, ...] = ("none", "int8", "int4")


def take_over(decoder: Decoder, choices: Sequence[Quantization]) -> tuple[NativeDecoder, Quantization]:
    """The decoder in our own kernels, which must take it (`engine.native.decoder.can_take`), and its format.

    choices: as `engine.model.precision.quantization_choices` has them; more than one means the fastest that
    changes no matrix by more than a little. The decoder given loses its linear layers.
    """
    chosen, lossless = choices[0], len(choices) > 1
    if lossless:
        timings = measure(decoder, _AUTO, partial(_linear, lossless=True))
        chosen = fastest(timings)
        logger.info("Quantization: %s. %s", chosen, describe(timings))
    return NativeDecoder(decoder, partial(choose_kind, choice=chosen, lossless=lossless)), chosen


def choose_kind(name: str, weight: Tensor, choice: Quantization, lossless: bool) -> Kind:
    """Format of one matrix [out, in] under a choice for the whole model.

    lossless: keep 16 or 8 bits where fewer would change what the file says. The projection onto the
    vocabulary is never stored in 4 bits: that costs several per cent of perplexity.
    """
    if choice == "none":
        return Kind.BF16
    if choice == "int4" and name != "lm_head" and (not lossless or int4_error(weight) <= MAX_ERROR):
        return Kind.INT4
    return Kind.INT8 if int8_error(weight) <= MAX_ERROR or not lossless else Kind.BF16


def draft_linear(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """Multiplication by a weight [out, in] of draft heads, as fast as this machine can: guesses need not be
    exact, so that 8 bits do. Results have the dtype of what is multiplied."""
    if weight.dtype != torch.bfloat16 or not fits(weight):
        return fast_linear(weight)
    linear = NativeLinear(weight, None, Kind.INT8)
    return lambda x: linear(x).to(x.dtype)


def _linear(linear: Linear, name: str, choice: Quantization, lossless: bool) -> NativeLinear:
    kind = choose_kind(name, linear.weight, choice, lossless)
    return NativeLinear(linear.weight, linear.bias, kind)
