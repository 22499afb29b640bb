"""Cross-entropy over a vocabulary projection, without ever holding all of its logits.

Logits are most of what training heads costs, in time and in memory. A block of rows at a time stays in the
processor's cache, and its gradient is computed while the probabilities are at hand.

Where the projection W does not learn, a target distribution t need not be held either. With f a row of
features and m = W^T t, the mean of W's rows under t,

    loss = log sum exp(W f) - f m,    gradient = W^T softmax(W f) - m,

so that m, as long as a row of features, says all of t, and is the same for every head.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Rows whose logits exist at the same time: what a processor's cache holds, what fills a GPU.
ROWS_PER_BLOCK = 256
CUDA_ROWS_PER_BLOCK = 4096


def _blocks(rows: Tensor) -> Iterator[slice]:
    size = CUDA_ROWS_PER_BLOCK if rows.is_cuda else ROWS_PER_BLOCK
    for begin in range(0, len(rows), size):
        yield slice(begin, begin + size)


class _FrozenProjectionLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, projection: Tensor, wanted: Tensor) -> Tensor:
        gradient = torch.empty_like(features)
        loss = -(features.float() * wanted.float()).sum()
        for block in _blocks(features):
            logits = features[block] @ projection.t()
            # log sum exp by the likeliest token: its logit less its log-probability
            highest, places = logits.max(dim=1, keepdim=True)
            probabilities = logits.softmax(dim=1)
            loss += (highest.float() - probabilities.gather(1, places).float().log()).sum()
            torch.mm(probabilities, projection, out=gradient[block])
        ctx.save_for_backward(gradient.sub_(wanted))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_output.to(gradient.dtype), None, None


class _VocabularyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, features: Tensor, projection: Tensor, targets: Tensor, teacher: Tensor | None
    ) -> Tensor:
        gradient = torch.empty_like(features)
        of_projection = torch.zeros_like(projection)
        loss = torch.zeros((), dtype=torch.float32, device=features.device)
        for block in _blocks(features):
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
            of_projection.addmm_(difference.t(), features[block])
        ctx.save_for_backward(gradient, of_projection)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, None, None]:
        gradient, of_projection = ctx.saved_tensors
        scale = grad_output.to(gradient.dtype)
        return gradient * scale, of_projection * scale, None, None


def frozen_projection_loss(features: Tensor, projection: Tensor, wanted: Tensor) -> Tensor:
    """Sum over the rows of the cross-entropy, as float32, with a gradient for the features alone.

    features: [num_rows, hidden]; projection: [num_tokens, hidden]; wanted: [num_rows, hidden], for each row
    the mean of the projection's rows under its target distribution (`mean_rows`), or the projection's row of
    its target token. All of the same dtype; in bfloat16 the sum is good to about 0.01 per row.
    """
    loss: Tensor = _FrozenProjectionLoss.apply(features, projection, wanted)  # type: ignore[no-untyped-call]
    return loss


def vocabulary_loss(
    features: Tensor, projection: Tensor, targets: Tensor, teacher: Tensor | None = None
) -> Tensor:
    """Sum over the rows of the cross-entropy, as float32, with a gradient for the projection too.

    features: [num_rows, hidden]; projection: [num_tokens, hidden], of the same dtype. Without a
    teacher, targets: [num_rows] int64 are columns of the projection. With one, [num_texts, num_tokens]
    distributions of the same dtype, they say which of these each row should give.
    """
    loss: Tensor = _VocabularyLoss.apply(features, projection, targets, teacher)  # type: ignore[no-untyped-call]
    return loss


@torch.no_grad()
def distributions(hidden: Tensor, projection: Tensor) -> Tensor:
    """The base's own predictions over the tokens of the projection, [num_rows, num_tokens].

    hidden: [num_rows, hidden], the base's last rows; projection: [num_tokens, hidden].
    """
    result = hidden.new_empty(len(hidden), len(projection))
    for block in _blocks(hidden):
        result[block] = (hidden[block] @ projection.t()).softmax(dim=1)
    return result


@torch.no_grad()
def mean_rows(hidden: Tensor, projection: Tensor) -> Tensor:
    """The means of the projection's rows under `distributions`, [num_rows, hidden]."""
    result = torch.empty_like(hidden)
    for block in _blocks(hidden):
        torch.mm((hidden[block] @ projection.t()).softmax(dim=1), projection, out=result[block])
    return result
