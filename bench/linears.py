"""`gorgon bench linears`: milliseconds that a pass spends in the decoder's matrices, by their number format.

What is the fastest depends on the number of tokens in the pass: this is where the crossings are read off.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bench.facts import machine_facts
from bench.report import print_json, print_table
from engine.config import Quantization

if TYPE_CHECKING:
    from torch import nn

# Name, format, and whether our own kernels multiply or torch's operators.
VARIANTS: tuple[tuple[str, Quantization, bool], ...] = (
    ("bfloat16", "none", True),
    ("int8", "int8", True),
    ("int4", "int4", True),
    ("bfloat16, torch", "none", False),
    ("int8, torch", "int8", False),
    ("int4, torch", "int4", False),
)
TOKENS = (1, 2, 4, 8, 12, 16, 32, 64, 128)  # in a pass
REPEATS = 10


@dataclass(frozen=True)
class Linears:
    """The matrices of a decoder, each with the size of its inputs: those of the layers in the order of a
    pass, and the projection onto the vocabulary."""

    layers: list[tuple[int, nn.Module]]
    lm_head: tuple[int, nn.Module]


@dataclass(frozen=True)
class Times:
    """Milliseconds of one pass: the layers' matrices, and the projection onto the vocabulary."""

    layers: float = math.inf
    lm_head: float = math.inf


def run(model_name: str, tokens: Sequence[int] = TOKENS, repeats: int = REPEATS) -> int:
    import torch

    from heads.registry import resolve_model

    model = resolve_model(model_name)
    loaded = {name: load(model.model_dir, kind, native) for name, kind, native in VARIANTS}
    decoders = {name: linears for name, linears in loaded.items() if linears is not None}
    times = {number: measure(decoders, number, repeats) for number in tokens}
    print_table(
        ["tokens", *decoders],
        [[n, *(f"{t.layers:.1f} + {t.lm_head:.1f}" for t in row.values())] for n, row in times.items()],
    )
    print_json(
        {
            "bench": "linears",
            **machine_facts(),
            "model": model.name,
            "threads": torch.get_num_threads(),
            "repeats": repeats,
            "milliseconds": {
                name: {n: [round(t[name].layers, 3), round(t[name].lm_head, 3)] for n, t in times.items()}
                for name in decoders
            },
        }
    )
    return 0


def load(model_dir: Path, quantization: Quantization, native: bool) -> Linears | None:
    """None where this machine has no kernels for the model, or no operators for the format."""
    import torch

    from engine.backends.native.decoder import can_take
    from engine.backends.native.precision import take_over
    from engine.backends.torch.precision import quantize_linears, resolve_quantization
    from engine.errors import ConfigError
    from engine.model.loader import load_decoder

    device, dtype = torch.device("cpu"), torch.bfloat16
    decoder = load_decoder(model_dir, dtype, device)
    lm_head: nn.Module
    c = decoder.config
    sizes = (c.hidden_size, c.num_heads * c.head_dim, c.hidden_size, c.intermediate_size)
    try:
        asked = resolve_quantization(quantization, dtype, device)
    except ConfigError:
        return None
    if not native:
        quantize_linears(decoder, asked, 1 << 62)
        names = ("qkv", "o", "gate_up", "down")
        layers = [layer.get_submodule(name) for layer in decoder.layers for name in names]
        lm_head = decoder.lm_head
    elif can_take(decoder):
        taken, _ = take_over(decoder, asked)
        layers, lm_head = list(taken.layers), taken.lm_head
    else:
        return None
    return Linears(list(zip(itertools.cycle(sizes), layers, strict=False)), (c.hidden_size, lm_head))


def measure(decoders: dict[str, Linears], num_tokens: int, repeats: int) -> dict[str, Times]:
    """The fastest of some passes of each, in turns: what else the machine does hits all alike."""
    import torch

    best = dict.fromkeys(decoders, Times())
    with torch.inference_mode():
        for _ in range(repeats):
            for name, decoder in decoders.items():
                found = _time(decoder, num_tokens)
                layers, lm_head = best[name].layers, best[name].lm_head
                best[name] = Times(min(layers, found.layers), min(lm_head, found.lm_head))
    return best


def _time(linears: Linears, num_tokens: int) -> Times:
    import torch

    sizes = {size for size, _ in (*linears.layers, linears.lm_head)}
    inputs = {size: torch.randn(num_tokens, size).bfloat16() for size in sizes}
    start = time.perf_counter()
    for size, module in linears.layers:
        module(inputs[size])
    between = time.perf_counter()
    size, module = linears.lm_head
    module(inputs[size])
    return Times(1000 * (between - start), 1000 * (time.perf_counter() - between))
