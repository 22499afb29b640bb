"""The cosines and sines of rotary position embedding, for every scaling the known checkpoints use."""

from __future__ import annotations

import math
import reprlib

import torch
from torch import Tensor

from engine.errors import ModelError
from engine.files.fields import MAX_POSITIONS, Fields
from engine.model.config import RopeSpec

_FACTOR = (1e-3, 1e6)  # bounds of factors and of numbers of turns
_ORIGINAL = "original_max_position_embeddings"


def rope_table(rope: RopeSpec, head_dim: int, num_positions: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines, float32 [num_positions, head_dim] each, the first half of the sines negated.

    Computed on the CPU whatever the default device, so that every device rotates by the same numbers.
    Raises ModelError for a scaling it does not know.
    """
    frequencies, attention_factor = rope_frequencies(rope, head_dim)
    cos, sin = rotation_table(frequencies, num_positions)
    return cos * attention_factor, sin * attention_factor


def rope_frequencies(rope: RopeSpec, head_dim: int) -> tuple[Tensor, float]:
    """Radians for each position, [head_dim / 2] float32, and the factor on cosines and sines.

    Raises ModelError for a scaling that is not known or not sound.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    frequencies, attention_factor = _scale(1.0 / rope.theta**exponents, rope)
    if not (frequencies.isfinite() & (frequencies > 0)).all() or not 0 < attention_factor < math.inf:
        raise ModelError(f"rope scaling {reprlib.repr(rope.scaling)} gives frequencies that are none")
    return frequencies, attention_factor


def rotation_table(frequencies: Tensor, num_positions: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines, float32 [num_positions, head_dim] each, the first half of the sines negated.

    frequencies: [head_dim / 2] float32 on the CPU, in radians for each position.
    """
    positions = torch.arange(num_positions, dtype=torch.float32, device="cpu")
    angles = torch.outer(positions, frequencies)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def _scale(frequencies: Tensor, rope: RopeSpec) -> tuple[Tensor, float]:
    """Frequencies after the checkpoint's scaling, and the factor on cosines and sines."""
    values = rope.scaling or {}
    kind = str(values.get("rope_type", values.get("type", "default")))
    scaling = Fields(f"rope scaling of type {kind!r}", values)
    if kind in ("default", "none"):
        return frequencies, 1.0
    if kind == "dynamic":
        # It stretches texts beyond max_position_embeddings only, and no request is that long: frequencies
        # that change as a text grows would not fit the keys that are in the cache already.
        return frequencies, 1.0
    if kind == "linear":
        return frequencies / scaling.real("factor", *_FACTOR), 1.0
    if kind == "llama3":
        return _llama3(frequencies, scaling), 1.0
    if kind == "yarn":
        return _yarn(frequencies, scaling, rope.theta)
    if kind == "divisors":  # how GGUF files carry Llama 3's scaling: one divisor per frequency
        divisors = torch.tensor(scaling.numbers("divisors"), dtype=torch.float32, device="cpu")
        if divisors.shape != frequencies.shape:
            raise ModelError(f"{len(divisors)} rope divisors for {len(frequencies)} frequencies")
        return frequencies / divisors, 1.0
    raise ModelError(
        f"rope scaling of type {kind!r} is not supported; known are: linear, dynamic, llama3, yarn"
    )


def _llama3(frequencies: Tensor, scaling: Fields) -> Tensor:
    """Slow frequencies are divided by the factor, fast ones kept, those between blended."""
    factor, low, high = (scaling.real(k, *_FACTOR) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    if low >= high:
        raise scaling.error("high_freq_factor", f"above low_freq_factor, {low:g}")
    turns = scaling.whole(_ORIGINAL, 1, MAX_POSITIONS) * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)  # share of each frequency that stays as it is
    return kept * frequencies + (1 - kept) * frequencies / factor


def _yarn(frequencies: Tensor, scaling: Fields, theta: float) -> tuple[Tensor, float]:
    """YaRN (arXiv 2309.00071): a ramp over the dimensions, and a temperature on the attention."""
    factor = scaling.real("factor", *_FACTOR)
    original = scaling.whole(_ORIGINAL, 1, MAX_POSITIONS)

    def dimension(turns: float) -> float:
        """The dimension whose frequency makes so many turns within the original context."""
        return len(frequencies) * math.log(original / (turns * 2 * math.pi)) / math.log(theta)

    low = dimension(scaling.real("beta_fast", *_FACTOR, default=32))
    high = dimension(scaling.real("beta_slow", *_FACTOR, default=1))
    if scaling.flag("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * len(frequencies) - 1)
    if low == high:
        high += 0.001
    index = torch.arange(len(frequencies), dtype=torch.float32, device="cpu")
    scaled = ((index - low) / (high - low)).clamp(0, 1)  # share of each frequency that is divided
    frequencies = scaled * frequencies / factor + (1 - scaled) * frequencies

    if scaling.values.get("attention_factor") is not None:
        return frequencies, scaling.real("attention_factor", *_FACTOR)
    mscale, mscale_all = (scaling.real(k, 0.0, 1e3, default=0.0) for k in ("mscale", "mscale_all_dim"))
    if mscale and mscale_all:
        return frequencies, _magnitude(factor, mscale) / _magnitude(factor, mscale_all)
    return frequencies, _magnitude(factor, 1.0)


def _magnitude(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
