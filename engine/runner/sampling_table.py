"""What each running request asks of its draws, where the device reads it: one row for every row of the
runner's per-request state, written once when a request takes that row over."""

from __future__ import annotations

from enum import Flag, auto

import numpy as np
import torch
from torch import Tensor

from engine.backends.noise import Noise, make_keys, mix_seed
from engine.batch import RequestState
from engine.messages import SamplingParams
from engine.runner.transfer import to_device

COLDEST = 1e-6  # a lower temperature draws the same tokens, until dividing by it overflows
_REALS = (
    "temperature", "top_p", "min_p", "repetition", "frequency", "presence", "is_typical", "epsilon", "delta",
    "draft_temperature",
)  # fmt: skip
_NOBODY = {"top_p": 1.0, "repetition": 1.0}  # what a row holds that no request has had


class Demand(Flag):
    """What requests ask for beyond their likeliest tokens."""

    NOTHING = 0
    BIAS = auto()
    PENALTIES = auto()
    MIN_TOKENS = auto()
    DRAW = auto()  # a temperature
    CUTS = auto()  # top-k, top-p or min-p
    TYPICAL = auto()  # typical acceptance

    @classmethod
    def of(cls, params: SamplingParams) -> Demand:
        """What one request asks for."""
        demand = cls.NOTHING
        if params.logit_bias:
            demand |= cls.BIAS
        if params.repetition_penalty != 1.0 or params.frequency_penalty or params.presence_penalty:
            demand |= cls.PENALTIES
        if params.min_tokens:
            demand |= cls.MIN_TOKENS
        if params.temperature > 0.0:
            demand |= cls.DRAW
            if params.top_k or params.top_p < 1.0 or params.min_p:
                demand |= cls.CUTS
            if params.speculation.acceptance == "typical":
                demand |= cls.TYPICAL
        return demand


EVERYTHING = ~Demand.NOTHING


class SamplingTable:
    """Numbers of each request: by name with `real`, and what its draws' noise is made of."""

    def __init__(self, num_seats: int, device: torch.device) -> None:
        nobody = torch.tensor([_NOBODY.get(name, 0.0) for name in _REALS], dtype=torch.float64)
        self._reals = nobody.repeat(num_seats, 1).to(device)
        self._seeds = torch.zeros(num_seats, dtype=torch.int64, device=device)
        self._top_k = torch.zeros(num_seats, dtype=torch.int64, device=device)

    def load(self, request: RequestState, seat: int) -> None:
        """Write a request's row."""
        params = request.sampling
        temperature = max(params.temperature, COLDEST) if params.temperature > 0.0 else 0.0
        speculation = params.speculation
        values = {
            "temperature": temperature,
            "top_p": params.top_p,
            "min_p": params.min_p,
            "repetition": params.repetition_penalty,
            "frequency": params.frequency_penalty,
            "presence": params.presence_penalty,
            "is_typical": float(Demand.TYPICAL in Demand.of(params)),
            "epsilon": speculation.epsilon,
            "delta": speculation.delta,
            # One token is all that a top-k of 1 leaves: its noise decides nothing.
            "draft_temperature": 0.0 if params.top_k == 1 else params.temperature,
        }
        row = np.array([values[name] for name in _REALS], dtype=np.float64)
        self._reals[seat] = to_device(row, self._reals.device)
        self._seeds[seat] = mix_seed(request.seed)
        self._top_k[seat] = params.top_k

    def real(self, name: str, seats: Tensor) -> Tensor:
        """One number of each of these rows, [num_rows] float64. seats: [num_rows] int64"""
        return self._reals[:, _REALS.index(name)][seats]

    def top_k(self, seats: Tensor) -> Tensor:
        """[num_rows] int64, 0 where it is off"""
        return self._top_k[seats]

    def keys(self, seats: Tensor, positions: Tensor) -> Tensor:
        """Keys of the draws of tokens at these positions, int64. seats, positions: of the same shape."""
        return make_keys(self._seeds[seats], positions)

    def noise_ahead(self, seats: Tensor, roots: Tensor, num_levels: int) -> Noise:
        """Noise of the draws that follow each root. seats, roots (positions): [num_requests] int64"""
        ahead = torch.arange(1, num_levels + 1, device=roots.device)
        keys = self.keys(seats.unsqueeze(1).expand(-1, num_levels), roots.unsqueeze(1) + ahead)
        return Noise(keys, self.real("draft_temperature", seats).float())
