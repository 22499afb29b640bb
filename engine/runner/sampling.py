"""The arithmetic of sampling that no backend does otherwise: pure functions on rows of logits."""

from __future__ import annotations

import torch
from torch import Tensor

_LARGEST = 1e30  # bound of a penalised logit: finite in float32 even after division by COLDEST


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


def typical_threshold(probs: Tensor, epsilon: Tensor, delta: Tensor) -> Tensor:
    """Medusa's typical acceptance, min(epsilon, delta * exp(-entropy)) per row (arXiv 2401.10774, 2.3.1).

    probs: [num_rows, vocab], each row's sum 1; epsilon, delta: [num_rows] -> [num_rows]
    """
    entropy = -torch.xlogy(probs, probs).sum(dim=1)
    return torch.minimum(delta * torch.exp(-entropy), epsilon)
