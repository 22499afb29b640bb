"""How rows of logits are drawn from: plain data that backends compute with."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Draws:
    """How each of some rows is drawn from; every field [num_rows], on the device of the rows."""

    keys: Tensor  # int64, of the noise
    temperatures: Tensor  # float32; 0 is greedy
    top_k: Tensor  # int64; 0 is off
    top_p: Tensor  # float64; 1 is off
    min_p: Tensor  # float32; 0 is off
