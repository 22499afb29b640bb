"""The arithmetic of sampling: pure functions from logits to tokens.

A draw is the argmax of what penalties, temperature and cuts leave, and of noise (`engine/backends/noise.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.backends.native import matrix

_ARGMAX_BLOCKS = 64
_LARGEST = 1e30  # bound of a penalised logit: finite in float32 even after division by COLDEST
_NUCLEUS_TRIAL = 256  # candidates tried before a whole vocabulary is sorted for top-p


def argmax(logits: Tensor) -> Tensor:
    """The first largest entry of each row: [num_rows, vocab] -> [num_rows] int64.

    In two stages: on CPUs torch finds a maximum far faster than its place, ten times so in bfloat16.
    """
    found = matrix.argmax(logits)
    if found is not None:
        return found
    rows, vocab = logits.shape
    if vocab % _ARGMAX_BLOCKS:
        return logits.max(dim=1).indices
    blocks = logits.view(rows, _ARGMAX_BLOCKS, -1)
    best = blocks.amax(dim=2).argmax(dim=1)
    inside = blocks[torch.arange(rows, device=logits.device), best].argmax(dim=1)
    return best * (vocab // _ARGMAX_BLOCKS) + inside


def apply_penalties(
    logits: Tensor,
    output_counts: Tensor,
    seen: Tensor,
    repetition: Tensor,
    frequency: Tensor,
    presence: Tensor,
) -> Tensor:
    """Penalties as OpenAI (frequency, presence) and CTRL (repetition) define them.

    logits: [num_rows, vocab] float32; output_counts: [num_rows, vocab] how often each token was generated
    before that row; seen: [num_rows, vocab] bool, prompt included; the penalties: [num_rows, 1] float32.
    """
    penalised = torch.where(logits > 0, logits / repetition, logits * repetition)
    penalised = penalised.clamp(-_LARGEST, _LARGEST)
    logits = torch.where(seen & (repetition != 1.0), penalised, logits)
    return logits - frequency * output_counts - presence * (output_counts > 0)


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


def typical_threshold(probs: Tensor, epsilon: Tensor, delta: Tensor) -> Tensor:
    """Medusa's typical acceptance, min(epsilon, delta * exp(-entropy)) per row (arXiv 2401.10774, 2.3.1).

    probs: [num_rows, vocab], each row's sum 1; epsilon, delta: [num_rows] -> [num_rows]
    """
    entropy = -torch.xlogy(probs, probs).sum(dim=1)
    return torch.minimum(delta * torch.exp(-entropy), epsilon)
