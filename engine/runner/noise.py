"""The noise that makes a draw of an argmax, known before the draw.

The token with the largest logit / temperature + Gumbel noise is one from the softmax (the Gumbel-max trick:
Maddison et al., A* Sampling, 2014, section 2). The noise of a token depends on nothing but the request's
seed, the position and the token: no tree, batch or neighbour can change what is drawn. And a drafter that
adds the same noise to its own logits guesses what will be drawn, not just what is likely, while what is drawn
is the model's alone (coupled draws: Daliri, Musco and Suresh, arXiv 2408.07978).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.native import noise as native
from engine.runner.transfer import to_device
from engine.scheduling.request import Request

COLDEST = 1e-6  # a lower temperature draws the same tokens, until dividing by it overflows
_LARGEST_SHARE = 1.0 - 2.0**-24  # below 1 in float32
_LOW = 0xFFFFFFFF
_MOST_AT_ONCE = 1 << 24  # numbers of 8 bytes, of which there are several for each of noise


def make_keys(seeds: NDArray[np.uint64], positions: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """One key per pair, by the finaliser of SplitMix64 (Steele et al., 2014) over both."""
    return _mix(_mix(seeds) + positions * np.uint64(0x9E3779B97F4A7C15))


def keys_of_draws(requests: Sequence[Request], offsets: Sequence[NDArray[np.int64]]) -> NDArray[np.uint64]:
    """Of draws so many tokens after each request's known ones, one request's after the other's."""
    counts = [len(offset) for offset in offsets]
    seeds = np.array([request.seed % 2**64 for request in requests], dtype=np.uint64)
    known = np.array([len(request.token_ids) for request in requests], dtype=np.int64)
    positions = np.repeat(known, counts) + np.concatenate(offsets)
    return make_keys(np.repeat(seeds, counts), positions.astype(np.uint64))


def gumbel(
    keys: NDArray[np.uint64],
    scales: NDArray[np.float32],
    num_tokens: int,
    device: torch.device,
    token_ids: Tensor | None = None,
) -> Tensor:
    """Noise of each key times its scale, [num_keys, num_tokens] float32.

    token_ids: [num_tokens] int64 of which tokens; None for all of a vocabulary of num_tokens.
    """
    if device.type == "cpu" and (made := native.gumbel(keys, scales, token_ids, num_tokens)) is not None:
        return made
    if token_ids is None:
        token_ids = torch.arange(num_tokens, device=device)
    halves = np.stack((keys & np.uint64(_LOW), keys >> np.uint64(32)), axis=1).astype(np.int64)
    low, high = to_device(halves, device).unsqueeze(2).unbind(1)  # [num_keys, 1]
    out = torch.empty(len(keys), num_tokens, device=device)
    at_once = max(1, _MOST_AT_ONCE // num_tokens)
    for rows, a, b in zip(*(torch.split(x, at_once) for x in (out, low, high)), strict=True):
        mixed = _mix_32(_mix_32((token_ids + a) & _LOW) ^ b)
        shares = ((mixed.float() + 0.5) * 2.0**-32).clamp_(max=_LARGEST_SHARE)
        # Small shares are those that win: log1p tells them apart down to 2**-33.
        torch.log1p(shares.neg_(), out=rows).neg_().log_().neg_()
    return out.mul_(to_device(scales, device).unsqueeze(1))


@dataclass(frozen=True)
class Noise:
    """What the coming draws of some requests are made with.

    keys: [num_requests, num_levels] uint64, of the first token after the known ones, of the second, ...;
    temperatures: [num_requests] float32, 0 where a request is greedy.
    """

    keys: NDArray[np.uint64]
    temperatures: NDArray[np.float32]

    @classmethod
    def ahead(cls, requests: Sequence[Request], num_levels: int) -> Noise | None:
        """None where all requests are greedy, by their temperature or because one token is all they leave."""
        params = [request.sampling for request in requests]
        temperatures = np.array([0.0 if p.top_k == 1 else p.temperature for p in params], dtype=np.float32)
        if not temperatures.any():
            return None
        keys = keys_of_draws(requests, [np.arange(num_levels)] * len(requests))
        return cls(keys.reshape(len(requests), num_levels), temperatures)

    def rows(self, indices: Sequence[int]) -> Noise:
        """Of some of the requests."""
        return Noise(self.keys[indices], self.temperatures[indices])

    def of_level(
        self, level: int, num_tokens: int, device: torch.device, token_ids: Tensor | None = None
    ) -> Tensor:
        """What to add to the logits of that level's guesses, [num_requests, num_tokens]; see `gumbel`."""
        return gumbel(self.keys[:, level], self.temperatures, num_tokens, device, token_ids)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _mix_32(x: Tensor) -> Tensor:
    """A bijection of 32-bit numbers, kept in int64, under which neighbours differ in every bit half the time
    (constants: C. Wellons, Prospecting for Hash Functions, 2018)."""
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _LOW
    x = ((x ^ (x >> 15)) * 0xD35A2D97) & _LOW
    return x ^ (x >> 15)
