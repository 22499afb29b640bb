"""The noise that makes a draw of an argmax, known before the draw.

The token with the largest logit / temperature + Gumbel noise is one from the softmax (the Gumbel-max trick:
Maddison et al., A* Sampling, 2014, section 2). The noise of a token depends on nothing but the request's
seed, the position and the token: no tree, batch or neighbour can change what is drawn. And a drafter that
adds the same noise to its own logits guesses what will be drawn, not just what is likely, while what is drawn
is the model's alone (coupled draws: Daliri, Musco and Suresh, arXiv 2408.07978).

All of it is arithmetic on tensors of one device: a CUDA graph may hold it. 64-bit keys travel as int64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_LARGEST_SHARE = 1.0 - 2.0**-24  # below 1 in float32
_LOW = 0xFFFFFFFF
_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # SplitMix64's
_MOST_AT_ONCE = 1 << 24  # numbers of 8 bytes, of which there are several for each of noise


def mix_seed(seed: int) -> int:
    """What `make_keys` takes of a request's seed, as int64 has it."""
    x = (seed + _GOLDEN) % 2**64
    x = (x ^ (x >> 30)) * _FIRST % 2**64
    x = (x ^ (x >> 27)) * _SECOND % 2**64
    return _signed(x ^ (x >> 31))


def make_keys(mixed_seeds: Tensor, positions: Tensor) -> Tensor:
    """One key per pair, by the finaliser of SplitMix64 (Steele et al., 2014) over both.

    mixed_seeds: int64, as `mix_seed` makes them; positions: int64 of a shape that goes with theirs. A
    position is that of the token to be drawn.
    """
    return _mix(mixed_seeds + positions * _signed(_GOLDEN))


def gumbel(keys: Tensor, scales: Tensor, num_tokens: int, token_ids: Tensor | None = None) -> Tensor:
    """Noise of each key times its scale, [num_keys, num_tokens] float32, by torch's operators.

    keys: [num_keys] int64; scales: [num_keys] float32; token_ids: [num_tokens] int64 of which tokens, None
    for all of a vocabulary of num_tokens.
    """
    if token_ids is None:
        token_ids = torch.arange(num_tokens, device=keys.device)
    low, high = (keys & _LOW).unsqueeze(1), ((keys >> 32) & _LOW).unsqueeze(1)
    out = torch.empty(len(keys), num_tokens, device=keys.device)
    at_once = max(1, _MOST_AT_ONCE // num_tokens)
    for rows, a, b in zip(*(torch.split(x, at_once) for x in (out, low, high)), strict=True):
        mixed = _mix_32(_mix_32((token_ids + a) & _LOW) ^ b)
        shares = ((mixed.float() + 0.5) * 2.0**-32).clamp_(max=_LARGEST_SHARE)
        # Small shares are those that win: log1p tells them apart down to 2**-33.
        torch.log1p(shares.neg_(), out=rows).neg_().log_().neg_()
    return out.mul_(scales.unsqueeze(1))


@dataclass(frozen=True)
class Noise:
    """What the coming draws of some requests are made with."""

    # [num_requests, num_levels] int64, of the first token after the known ones, of the second, ...
    keys: Tensor
    temperatures: Tensor  # [num_requests] float32, 0 where a request is greedy

    def rows(self, indices: Tensor) -> Noise:
        """The noise of some of the requests. indices: [num_rows] int64"""
        return Noise(self.keys[indices], self.temperatures[indices])


def _signed(bits: int) -> int:
    """An unsigned number of 64 bits as int64 has it."""
    return bits - 2**64 if bits >= 2**63 else bits


def _mix(x: Tensor) -> Tensor:
    """int64 of any shape, whose arithmetic wraps as that of unsigned numbers does."""
    x = x + _signed(_GOLDEN)
    x = (x ^ _shifted(x, 30)) * _signed(_FIRST)
    x = (x ^ _shifted(x, 27)) * _signed(_SECOND)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """To the right, without copies of the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix_32(x: Tensor) -> Tensor:
    """A bijection of 32-bit numbers, kept in int64, under which neighbours differ in every bit half the time
    (constants: C. Wellons, Prospecting for Hash Functions, 2018)."""
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _LOW
    x = ((x ^ (x >> 15)) * 0xD35A2D97) & _LOW
    return x ^ (x >> 15)
