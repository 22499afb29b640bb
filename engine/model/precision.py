"""Which operators multiply by the decoder's weights: those asked for, or the fastest that keep what the file
says."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from engine.config import Quantization
from engine.errors import ConfigError
from engine.model.decoder import Decoder, Linear
from engine.model.packing import PackedLinear, can_pack, pack_linears, replace_linears
from engine.model.quantization import Int4Linear, Int8Linear, fits_int4, int4_error
from engine.model.scaled import FP8_CAPABILITY, ScaledFP8Linear, ScaledInt8Linear, fits_scaled

logger = logging.getLogger(__name__)

# What auto lets int4 change in a matrix, relative to its size. What was stored in 4 bits with a scale and an
# offset for every 32 weights changes by less than half a per cent; anything else by 7 per cent, which costs a
# small model several per cent of perplexity.
MAX_ERROR = 0.015
_TIMED_ROWS = (1, 8, 16)  # a plain pass, a small tree, a larger one or several requests
_REPEATS = 4
_WORTHWHILE = 0.95  # of the time without: what saves less is not worth another number format
# By what was timed. Engines of one process decide alike: speculation on and off are compared on one model.
_timings: dict[tuple[object, ...], dict[Quantization, list[float]]] = {}
MakeLinear = Callable[[Linear, str, Quantization], nn.Module]
_CACHE_BYTES = 64 << 20  # displaces the weights from the caches, as a pass does between two visits of a layer


def quantization_choices(
    asked: Quantization, dtype: torch.dtype, device: torch.device
) -> tuple[Quantization, ...]:
    """What auto may choose from, or what was asked for alone. "none" is among auto's.

    float32 and float16 mean what they say: auto leaves them alone, and all that is on a GPU. Raises
    ConfigError where a format cannot be had with this number format or on this machine.
    """
    if device.type == "cuda" and asked not in ("auto", "none"):
        return _on_gpu(asked, dtype, device)
    on_cpu = device.type == "cpu" and can_pack(torch.empty(0, dtype=torch.bfloat16))
    if asked == "none":
        return ("none",)
    if asked == "auto":
        return ("none", "int4") if on_cpu and dtype == torch.bfloat16 else ("none",)
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
    return (asked,)


def _on_gpu(asked: Quantization, dtype: torch.dtype, device: torch.device) -> tuple[Quantization, ...]:
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
    return (asked,)


def quantize_linears(decoder: Decoder, choices: Sequence[Quantization], spare_memory: int) -> Quantization:
    """Replace the decoder's linear layers by the fastest of `choices`; returns which that was.

    Their plain weights are freed, a tied embedding aside: take what you need of them before. spare_memory:
    bytes that second copies of the weights, for other numbers of rows, may take.
    """
    chosen = choices[0]
    if len(choices) > 1:
        timings = measure(decoder, choices)
        chosen = fastest(timings)
        logger.info("Quantization: %s. %s", chosen, describe(timings))
    if chosen == "none":
        pack_linears(decoder)
        return chosen
    weights = sum(child.weight.nbytes for child in decoder.modules() if isinstance(child, Linear))
    lossless, copies = len(choices) > 1, weights <= spare_memory
    replace_linears(decoder, lambda name, linear: _quantized(linear, name, chosen, lossless, copies))
    return chosen


def fastest(timings: Mapping[Quantization, Sequence[float]]) -> Quantization:
    """The choice of the shortest times, all numbers of rows weighing the same.

    timings: seconds by number of rows, "none" among the choices; that stays unless another is clearly faster.
    """
    means = {choice: math.exp(sum(map(math.log, times)) / len(times)) for choice, times in timings.items()}
    best = min(means, key=lambda choice: means[choice])
    return best if means[best] < _WORTHWHILE * means["none"] else "none"


def describe(timings: Mapping[Quantization, Sequence[float]]) -> str:
    """The timings in words, for the log."""
    rows = "/".join(map(str, _TIMED_ROWS))
    times = ", ".join(
        f"{choice} {'/'.join(f'{1000 * seconds:.2f}' for seconds in row)}" for choice, row in timings.items()
    )
    return f"Milliseconds of one layer's weights at {rows} tokens: {times}"


def measure(
    decoder: Decoder, choices: Sequence[Quantization], make: MakeLinear | None = None
) -> dict[Quantization, list[float]]:
    """Seconds that one layer's matrices take by number of rows, with the weights read from memory.

    Choices that change none of these matrices are left out. The same matrices are timed once a process.
    make: a linear layer, by its name, as auto would have it of a choice; torch's operators where None.
    """
    make = make or partial(_quantized, lossless=True)
    layer = decoder.layers[len(decoder.layers) // 2]
    linears = [(name, child) for name, child in layer.named_children() if isinstance(child, Linear)]
    made = {c: [make(child, name, c) for name, child in linears] for c in choices}
    plain = [str(module) for module in made["none"]]
    made = {c: modules for c, modules in made.items() if c == "none" or list(map(str, modules)) != plain}
    shapes = [child.weight.shape for _, child in linears]
    key = (*map(str, made.items()), *shapes, torch.get_num_threads())
    if key not in _timings:
        sizes = [columns for _, columns in shapes]
        by_rows = [_time(made, [torch.randn(n, size).bfloat16() for size in sizes]) for n in _TIMED_ROWS]
        _timings[key] = {choice: [times[choice] for times in by_rows] for choice in made}
    return _timings[key]


@torch.inference_mode()
def _time(
    made: Mapping[Quantization, Sequence[nn.Module]], inputs: Sequence[Tensor]
) -> dict[Quantization, float]:
    """The fastest of a few runs of each, in turns: what else the machine does hits all alike."""
    cache = torch.zeros(_CACHE_BYTES, dtype=torch.uint8)
    best = dict.fromkeys(made, math.inf)
    for _ in range(_REPEATS):
        for choice, modules in made.items():
            cache.add_(1)
            best[choice] = min(best[choice], _seconds(modules, inputs))
    return best


def _seconds(modules: Sequence[nn.Module], inputs: Sequence[Tensor]) -> float:
    start = time.perf_counter()
    for module, x in zip(modules, inputs, strict=True):
        module(x)
    return time.perf_counter() - start


def _quantized(
    linear: Linear, name: str, choice: Quantization, lossless: bool = False, copies: bool = True
) -> nn.Module:
    """A layer as `choice` has it; in bfloat16 where the operator does not take its shape.

    lossless: leave it in bfloat16 also where that would change what the file says.
    """
    weight, bias = linear.weight, linear.bias
    if weight.is_cuda:
        return scaled(linear, name, choice)
    if choice == "int8":
        return Int8Linear(weight, bias, keep_copy=copies)
    # The projection onto the vocabulary is never stored in 4 bits: it costs several per cent of perplexity.
    possible = choice == "int4" and name != "lm_head" and fits_int4(weight)
    if possible and (not lossless or int4_error(weight) <= MAX_ERROR):
        return Int4Linear(weight, bias, keep_copy=copies)
    return PackedLinear(weight, bias)


def scaled(linear: Linear, name: str, choice: Quantization) -> nn.Module:
    """A layer as a GPU has it, int8 or fp8; left alone where the products do not take its shape. fp8 spares
    the projection onto the vocabulary, as is the custom: its errors are those of every token."""
    if not fits_scaled(linear.weight) or (choice == "fp8" and name == "lm_head"):
        return linear
    made = ScaledInt8Linear if choice == "int8" else ScaledFP8Linear
    return made(linear.weight, linear.bias)
