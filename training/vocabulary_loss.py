"""Cross-entropy over the shared vocabulary projection, without ever holding all of its logits.

Logits are most of what training heads costs, in time and in memory. A block of rows at a time stays in the
processor's cache, and its gradient is computed while the probabilities are at hand.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

ROWS_PER_BLOCK = 256


class _VocabularyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, projection: Tensor, targets: Tensor) -> Tensor:
        gradient = torch.empty_like(features)
        loss = torch.zeros((), dtype=torch.float32, device=features.device)
        for begin in range(0, len(features), ROWS_PER_BLOCK):
            block = slice(begin, begin + ROWS_PER_BLOCK)
            chosen = targets[block].unsqueeze(1)
            probabilities = (features[block] @ projection.t()).softmax(dim=1)
            right = probabilities.gather(1, chosen).float()
            loss -= right.clamp_min(torch.finfo(torch.float32).tiny).log().sum()
            probabilities.scatter_add_(1, chosen, torch.full_like(chosen, -1, dtype=probabilities.dtype))
            torch.mm(probabilities, projection, out=gradient[block])
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_output.to(gradient.dtype), None, None


def vocabulary_loss(features: Tensor, projection: Tensor, targets: Tensor) -> Tensor:
    """Sum over the rows of -log p(target), as float32.

    features: [num_rows, hidden]; projection: [num_tokens, hidden], frozen, of the same dtype;
    targets: [num_rows] int64, columns of the projection.
    """
    loss: Tensor = _VocabularyLoss.apply(features, projection, targets)  # type: ignore[no-untyped-call]
    return loss
