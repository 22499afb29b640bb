"""`gorgon bench linears`: milliseconds that a pass spends in the decoder's matrices, by their number format.

What is the fastest depends on the number of tokens in the pass: this is where the crossings are read off.
"""

from __future__ import annotations

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
    from engine.model.decoder import Decoder

# Name, format, and whether weights may be held twice, for the operators of few and of many tokens.
VARIANTS: tuple[tuple[str, Quantization, bool], ...] = (
    ("bfloat16", "none", True),
    ("int8", "int8", True),
    ("int4", "int4", True),
    ("int4, one copy", "int4", False),
)
TOKENS = (1, 2, 4, 8, 12, 16, 32, 64, 128)  # in a pass
REPEATS = 10


@dataclass(frozen=True)
class Times:
    """Milliseconds of one pass: the layers' matrices, and the projection onto the vocabulary."""

    layers: float = math.inf
    lm_head: float = math.inf


def run(model_name: str, tokens: Sequence[int] = TOKENS, repeats: int = REPEATS) -> int:
    import torch

    from heads.registry import resolve_model

    model = resolve_model(model_name)
    decoders = {name: load(model.model_dir, kind, twice) for name, kind, twice in VARIANTS}
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


def load(model_dir: Path, quantization: Quantization, twice: bool) -> Decoder:
    import torch

    from engine.model.loader import load_decoder
    from engine.model.precision import quantization_choices, quantize_linears

    device, dtype = torch.device("cpu"), torch.bfloat16
    decoder = load_decoder(model_dir, dtype, device)
    quantize_linears(decoder, quantization_choices(quantization, dtype, device), 1 << 62 if twice else 0)
    return decoder


def measure(decoders: dict[str, Decoder], num_tokens: int, repeats: int) -> dict[str, Times]:
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


def _time(decoder: Decoder, num_tokens: int) -> Times:
    import torch

    c = decoder.config
    sizes = {
        "qkv": c.hidden_size,
        "o": c.num_heads * c.head_dim,
        "gate_up": c.hidden_size,
        "down": c.intermediate_size,
    }
    inputs = {name: torch.randn(num_tokens, size).bfloat16() for name, size in sizes.items()}
    start = time.perf_counter()
    for layer in decoder.layers:
        for name, x in inputs.items():
            layer.get_submodule(name)(x)
    between = time.perf_counter()
    decoder.lm_head(inputs["qkv"])
    return Times(1000 * (between - start), 1000 * (time.perf_counter() - between))
