"""The cosines and sines of rotary position embedding, for every scaling the known checkpoints use."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from engine.errors import ModelError
from engine.model.config import DecoderConfig


def rope_table(config: DecoderConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines, float32 [max_positions, head_dim] each, the first half of the sines negated.

    Computed on the CPU whatever the default device, so that every device rotates by the same numbers.
    Raises ModelError for a scaling it does not know.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents  # [head_dim / 2]
    frequencies, attention_factor = _scale(frequencies, config)
    cos, sin = rotation_table(frequencies, config.max_positions)
    return cos * attention_factor, sin * attention_factor


def rotation_table(frequencies: Tensor, num_positions: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines, float32 [num_positions, head_dim] each, the first half of the sines negated.

    frequencies: [head_dim / 2] float32 on the CPU, in radians for each position.
    """
    positions = torch.arange(num_positions, dtype=torch.float32, device="cpu")
    angles = torch.outer(positions, frequencies)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def _scale(frequencies: Tensor, config: DecoderConfig) -> tuple[Tensor, float]:
    """Frequencies after the checkpoint's scaling, and the factor on cosines and sines."""
    scaling = config.rope_scaling or {}
    kind = str(scaling.get("rope_type", scaling.get("type", "default")))
    try:
        if kind in ("default", "none"):
            return frequencies, 1.0
        if kind == "linear":
            return frequencies / float(scaling["factor"]), 1.0
        if kind == "llama3":
            return _llama3(frequencies, scaling), 1.0
        if kind == "yarn":
            return _yarn(frequencies, scaling, config)
        if kind == "divisors":  # how GGUF files carry Llama 3's scaling: one divisor per frequency
            return frequencies / torch.tensor(scaling["divisors"], dtype=torch.float32, device="cpu"), 1.0
    except KeyError as missing:
        raise ModelError(f"rope scaling of type {kind!r} lacks {missing}") from missing
    raise ModelError(f"rope scaling of type {kind!r} is not supported; known are: linear, llama3, yarn")


def _llama3(frequencies: Tensor, scaling: dict[str, Any]) -> Tensor:
    """Slow frequencies are divided by the factor, fast ones kept, those between blended."""
    factor, low, high = (float(scaling[k]) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    turns = float(scaling["original_max_position_embeddings"]) * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)  # share of each frequency that stays as it is
    return kept * frequencies + (1 - kept) * frequencies / factor


def _yarn(frequencies: Tensor, scaling: dict[str, Any], config: DecoderConfig) -> tuple[Tensor, float]:
    """YaRN (arXiv 2309.00071): a ramp over the dimensions, and a temperature on the attention."""
    factor = float(scaling["factor"])
    original = float(scaling["original_max_position_embeddings"])

    def dimension(turns: float) -> float:
        """The dimension whose frequency makes so many turns within the original context."""
        return (
            config.head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))
        )

    low = dimension(float(scaling.get("beta_fast") or 32))
    high = dimension(float(scaling.get("beta_slow") or 1))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.head_dim - 1)
    if low == high:
        high += 0.001
    index = torch.arange(len(frequencies), dtype=torch.float32, device="cpu")
    scaled = ((index - low) / (high - low)).clamp(0, 1)  # share of each frequency that is divided
    frequencies = scaled * frequencies / factor + (1 - scaled) * frequencies

    attention_factor = scaling.get("attention_factor")
    if attention_factor is None:
        mscale, mscale_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
        if mscale and mscale_all:
            attention_factor = _magnitude(factor, mscale) / _magnitude(factor, mscale_all)
        else:
            attention_factor = _magnitude(factor, 1.0)
    return frequencies, float(attention_factor)


def _magnitude(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
