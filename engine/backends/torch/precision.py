"""In which number format the decoder's weights are multiplied: the one asked for, or by a rule.

The rule of auto: of each matrix the smallest format that keeps what the file says. It depends on the file and
on which kernels this machine has, never on a timing: a start that measured something else would answer
otherwise.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable

import torch
from torch import nn

from engine.backends.torch.packing import PackedLinear, can_pack, pack_linears, replace_linears
from engine.backends.torch.quantization import Int4Linear, Int8Linear, fits_int4, int4_error
from engine.backends.torch.scaled import FP8_CAPABILITY, ScaledFP8Linear, ScaledInt8Linear, fits_scaled
from engine.config import Quantization
from engine.errors import ConfigError
from engine.host import available_memory
from engine.model.decoder import Decoder
from engine.model.layers import Linear

logger = logging.getLogger(__name__)

# What auto lets a format change in a matrix, relative to its size. What was stored in 4 bits with a scale and
# an offset for every 32 weights changes by less than half a per cent; anything else by 7 per cent, which
# costs a small model several per cent of perplexity. 8 bits change anything by half a per cent.
MAX_ERROR = 0.015
_COPIES_SHARE = 0.25  # of the memory that is free, for faster layouts of the same weights
BFLOAT16 = "bfloat16"  # a matrix's format where it is left as it is


def spare_memory() -> int:
    """Bytes of this machine that may go into second copies of weights, made to save time alone."""
    return int(available_memory() * _COPIES_SHARE)


def resolve_quantization(asked: Quantization, dtype: torch.dtype, device: torch.device) -> Quantization:
    """What was asked for, or "none" for an auto that leaves the weights alone.

    float32 and float16 mean what they say: auto leaves them alone, and all that is on a GPU. Raises
    ConfigError where a format cannot be had with this number format or on this machine.
    """
    if device.type == "cuda" and asked not in ("auto", "none"):
        return _on_gpu(asked, dtype, device)
    on_cpu = device.type == "cpu" and can_pack(torch.empty(0, dtype=torch.bfloat16))
    if asked == "none":
        return asked
    if asked == "auto":
        # Without vector instructions unpacking 4 bits takes longer than reading 16.
        vectors = torch.backends.cpu.get_cpu_capability() != "DEFAULT"
        return asked if on_cpu and vectors and dtype == torch.bfloat16 else "none"
    if asked == "fp8":
        raise ConfigError("quantization", "fp8 runs on GPUs alone; use int8, int4, auto or none")
    if not on_cpu:
        raise ConfigError("quantization", f"{asked} runs on CPUs, by oneDNN; use none, or --device cpu")
    if dtype != torch.bfloat16:
        name = str(dtype).removeprefix("torch.")
        raise ConfigError(
            "quantization", f"{asked} computes in bfloat16, not {name}; use none, or --dtype bfloat16"
        )
    if asked == "int8" and not torch.cpu._is_vnni_supported():
        # Sums of two products of 8 bits would saturate at 16.
        raise ConfigError("quantization", "int8 needs a CPU with AVX-512 VNNI; use auto, int4 or none")
    return asked


def _on_gpu(asked: Quantization, dtype: torch.dtype, device: torch.device) -> Quantization:
    """Raises ConfigError where a GPU has no products in the format asked for."""
    if asked == "int4":
        raise ConfigError("quantization", "int4 runs on CPUs; use int8 or fp8, or --device cpu")
    if dtype != torch.bfloat16:
        name = str(dtype).removeprefix("torch.")
        raise ConfigError(
            "quantization", f"{asked} computes in bfloat16, not {name}; use none, or --dtype bfloat16"
        )
    if asked == "fp8" and torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
        needed = ".".join(map(str, FP8_CAPABILITY))
        raise ConfigError("quantization", f"fp8 needs a GPU of compute capability {needed}; use int8 or none")
    return asked


def quantize_linears(decoder: Decoder, asked: Quantization, spare_memory: int) -> str:
    """Replace the decoder's linear layers by layers in the format asked for; returns `name_formats` of them.

    auto: int4 where that changes a matrix by no more than MAX_ERROR and the operator takes it, else bfloat16.
    Their plain weights are freed, a tied embedding aside: take what you need of them before. spare_memory:
    bytes that second copies of the weights, for other numbers of rows, may take.
    """
    if asked == "none":
        pack_linears(decoder)
        return asked
    weights = sum(child.weight.nbytes for child in decoder.modules() if isinstance(child, Linear))
    copies = weights <= spare_memory
    formats: list[tuple[str, int]] = []

    def make(name: str, linear: Linear) -> nn.Module:
        made = _quantized(linear, name, asked, copies)
        kind = "int4" if isinstance(made, Int4Linear) else BFLOAT16
        formats.append((kind, linear.weight.numel()))
        return made

    replace_linears(decoder, make)
    return name_formats(formats, "int4 and bfloat16") if asked == "auto" else asked


def name_formats(formats: Iterable[tuple[str, int]], choice: str) -> str:
    """What auto came to, as "int4+int8": the formats in use, that of the most weights first; "none" where all
    are bfloat16. Says so in the log, with the rule.

    formats: of each matrix, with its number of weights; choice: in words, what there was to choose from.
    """
    weights, matrices = Counter[str](), Counter[str]()
    for kind, size in formats:
        weights[kind] += size
        matrices[kind] += 1
    names = [name for name, _ in weights.most_common()]
    logger.info(
        "Number formats of the weights: %s; each matrix has the smallest of %s that changes it by no more "
        "than %.1f %%.",
        ", ".join(f"{name} in {matrices[name]} matrices" for name in names),
        choice,
        100 * MAX_ERROR,
    )
    return "none" if names == [BFLOAT16] else "+".join(names)


def _quantized(linear: Linear, name: str, asked: Quantization, copies: bool) -> nn.Module:
    """A layer as `asked` has it; in bfloat16 where the operator does not take its shape, and under auto also
    where int4 would change what the file says."""
    weight, bias = linear.weight, linear.bias
    if weight.is_cuda:
        return scaled(linear, name, asked)
    if asked == "int8":
        return Int8Linear(weight, bias, keep_copy=copies)
    # The projection onto the vocabulary is never stored in 4 bits: it costs several per cent of perplexity.
    possible = name != "lm_head" and fits_int4(weight)
    if possible and (asked == "int4" or int4_error(weight) <= MAX_ERROR):
        return Int4Linear(weight, bias, keep_copy=copies)
    return PackedLinear(weight, bias)


def scaled(linear: Linear, name: str, asked: Quantization) -> nn.Module:
    """A layer as a GPU has it, int8 or fp8; left alone where the products do not take its shape. fp8 spares
    the projection onto the vocabulary, as is the custom: its errors are those of every token."""
    if not fits_scaled(linear.weight) or (asked == "fp8" and name == "lm_head"):
        return linear
    made = ScaledInt8Linear if asked == "int8" else ScaledFP8Linear
    return made(linear.weight, linear.bias)
