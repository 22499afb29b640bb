"""Cross-entropy over a vocabulary projection, without ever holding all of its logits.

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
    def forward(
        ctx: Any, features: Tensor, projection: Tensor, targets: Tensor, teacher: Tensor | None
    ) -> Tensor:
        gradient = torch.empty_like(features)
        of_projection = torch.zeros_like(projection) if ctx.needs_input_grad[1] else None
        loss = torch.zeros((), dtype=torch.float32, device=features.device)
        for begin in range(0, len(features), ROWS_PER_BLOCK):
            block = slice(begin, begin + ROWS_PER_BLOCK)
            log_probabilities = (features[block] @ projection.t()).float().log_softmax(dim=1)
            if teacher is None:
                chosen = targets[block].unsqueeze(1)
                loss -= log_probabilities.gather(1, chosen).sum()
                difference = log_probabilities.exp_().scatter_add_(
                    1, chosen, -torch.ones_like(chosen).float()
                )
            else:
                wanted = teacher[targets[block]].float()
                loss -= (log_probabilities * wanted).sum()
                difference = log_probabilities.exp_().sub_(wanted)
            difference = difference.to(features.dtype)
            torch.mm(difference, projection, out=gradient[block])
            if of_projection is not None:
                of_projection.addmm_(difference.t(), features[block])
        ctx.save_for_backward(gradient, of_projection)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        gradient, of_projection = ctx.saved_tensors
        scale = grad_output.to(gradient.dtype)
        return gradient * scale, None if of_projection is None else of_projection * scale, None, None


def vocabulary_loss(
    features: Tensor, projection: Tensor, targets: Tensor, teacher: Tensor | None = None
) -> Tensor:
    """Sum over the rows of the cross-entropy, as float32.

    features: [num_rows, hidden]; projection: [num_tokens, hidden], of the same dtype. Without a
    teacher, targets: [num_rows] int64 are columns of the projection. With one, [num_texts, num_tokens]
    distributions of the same dtype, they say which of these each row should give.
    """
    loss: Tensor = _VocabularyLoss.apply(features, projection, targets, teacher)  # type: ignore[no-untyped-call]
    return loss


@torch.no_grad()
def distributions(hidden: Tensor, projection: Tensor) -> Tensor:
    """What the base itself says next, over the projection's tokens alone: [num_rows, num_tokens].

    hidden: [num_rows, hidden], the base's last rows; projection: [num_tokens, hidden].
    """
    result = hidden.new_empty(len(hidden), len(projection))
    for begin in range(0, len(hidden), ROWS_PER_BLOCK):
        block = slice(begin, begin + ROWS_PER_BLOCK)
        result[block] = (hidden[block] @ projection.t()).float().softmax(dim=1)
    return result
