"""Draws by torch's operators: pure functions from logits to tokens.

A draw is the argmax of what temperature and cuts leave, and of noise (`engine.backends.noise`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from engine.backends.draws import Draws

_ARGMAX_BLOCKS = 64
_NUCLEUS_TRIAL = 256  # candidates tried before a whole vocabulary is sorted for top-p


def argmax(logits: Tensor) -> Tensor:
    """The first largest entry of each row: [num_rows, vocab] -> [num_rows] int64.

    In two stages: on CPUs torch finds a maximum far faster than its place, ten times so in bfloat16.
    """
    rows, vocab = logits.shape
    if vocab % _ARGMAX_BLOCKS:
        return logits.max(dim=1).indices
    blocks = logits.view(rows, _ARGMAX_BLOCKS, -1)
    best = blocks.amax(dim=2).argmax(dim=1)
    inside = blocks[torch.arange(rows, device=logits.device), best].argmax(dim=1)
    return best * (vocab // _ARGMAX_BLOCKS) + inside


def truncate(logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, *, waits: bool = True) -> Tensor:
    """Probabilities after top-k, top-p and min-p; what falls away is zero, the rest is not rescaled.

    logits: [num_rows, vocab] float32, temperature applied; top_k: [num_rows] int64, 0 off; top_p, min_p:
    [num_rows]. Tokens tied with the last one kept are kept too: bfloat16 logits tie often, and which of
    them a sort puts first must not matter. waits: look at what was asked, and sort no more than it takes;
    without, the whole vocabulary is sorted and no shape depends on a value.
    """
    vocab = logits.shape[1]
    order = None if waits else logits.argsort(dim=1, descending=True)
    if order is not None or bool(top_k.any()):
        k = torch.where(top_k == 0, vocab, top_k.clamp(max=vocab))
        if order is None:
            best = logits.topk(min(int(top_k.max()), vocab), dim=1).values
        else:
            best = logits.gather(1, order)
        kth = best.gather(1, (k.clamp(max=best.shape[1]) - 1).unsqueeze(1))
        kth = torch.where((top_k == 0).unsqueeze(1), float("-inf"), kth)
        logits = logits.masked_fill(logits < kth, float("-inf"))
    probs = logits.softmax(dim=1)
    if order is not None:
        probs = torch.where(probs >= _floor_of(probs.gather(1, order), top_p), probs, 0.0)
    elif bool((top_p < 1.0).any()):
        probs = torch.where(probs >= _nucleus_floor(probs, top_p), probs, 0.0)
    return torch.where(probs >= probs.amax(dim=1, keepdim=True) * min_p.unsqueeze(1), probs, 0.0)


def _nucleus_floor(probs: Tensor, top_p: Tensor) -> Tensor:
    """The smallest probability inside each row's nucleus, [num_rows, 1]; 0 where top_p is 1."""
    best = probs.topk(min(_NUCLEUS_TRIAL, probs.shape[1]), dim=1).values
    mass = best.sum(dim=1, dtype=torch.float64)
    if bool(((top_p < 1.0) & (mass < top_p)).any()):
        best = probs.sort(dim=1, descending=True).values
    return _floor_of(best, top_p)


def _floor_of(best: Tensor, top_p: Tensor) -> Tensor:
    """The same from the largest probabilities of each row, falling, [num_rows, any]."""
    mass = best.cumsum(dim=1, dtype=torch.float64)
    last = (mass < top_p.unsqueeze(1)).sum(dim=1, keepdim=True).clamp(max=best.shape[1] - 1)
    return torch.where((top_p < 1.0).unsqueeze(1), best.gather(1, last), 0.0)


def draw(logits: Tensor, noise: Tensor, probs: Tensor | None = None) -> Tensor:
    """One token per row, [num_rows] int64, from the softmax of the logits.

    logits: [num_rows, vocab] float32, temperature applied; noise: the same shape; probs: the same shape, zero
    where a token is not to be drawn. A row that is no distribution gives some token of the vocabulary.
    """
    scores = logits + noise
    if probs is not None:
        scores.masked_fill_(probs <= 0.0, float("-inf"))
    return argmax(scores)


def draw_with_noise(
    logits: Tensor, draws: Draws, gumbel: Callable[[Tensor, Tensor, int], Tensor], cuts: bool, *, waits: bool
) -> tuple[Tensor, Tensor]:
    """Tokens [num_rows] int64 and the probabilities that they are drawn from, [num_rows, vocab].

    logits: [num_rows, vocab] float32; where a temperature is 0 the likeliest token is taken. gumbel: see
    `Backend.gumbel`; cuts: whether anybody asks for top-k, top-p or min-p; waits: see `truncate`.
    """
    bounds, is_greedy = torch.finfo(torch.float32), draws.temperatures == 0.0
    # From the largest down: where temperatures are low, scores are large, and noise would be lost.
    below = logits - logits.amax(dim=1, keepdim=True).clamp(bounds.min, bounds.max)
    scaled = below / torch.where(is_greedy, 1.0, draws.temperatures).unsqueeze(1)
    probs = scaled.softmax(dim=1)
    if cuts:
        top_k, top_p = draws.top_k.masked_fill(is_greedy, 0), draws.top_p.masked_fill(is_greedy, 1.0)
        probs = truncate(scaled, top_k, top_p, draws.min_p.masked_fill(is_greedy, 0.0), waits=waits)
    noise = gumbel(draws.keys, (~is_greedy).float(), scaled.shape[1])
    return draw(scaled, noise, probs if cuts else None), probs
