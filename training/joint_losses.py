"""The losses and schedules of joint training, each with its source (Medusa, arXiv 2401.10774).

The whole is `L = L_LM + lambda0(step) * sum_k 0.8^k * CE_k` (section 2.2.2; CE_k and its weights, section
2.2.1). Every part is a mean over answer positions: the user's words and padding count neither in the sum nor
in the divisor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from heads.base import DraftHeads
from training.backbone import Backbone
from training.heads_loss import projected
from training.vocabulary_loss import frozen_projection_loss, vocabulary_loss

ROWS_PER_BLOCK = 512  # rows whose logits exist at the same time


def phase_rate(step: int, num_steps: int, warmup: int) -> float:
    """Share of the highest learning rate: linear warm-up, then a cosine down to zero (appendix B)."""
    warmup = min(warmup, max(1, num_steps // 10))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup)))


def sine_ramp(step: int, num_steps: int) -> float:
    """Share of lambda0: a quarter of a sine from 0 to 1 over the joint phase.

    So heads that still make many errors do not disturb the backbone at the start (section 2.2.2, heads
    warm-up by a growing lambda0).
    """
    return math.sin(0.5 * math.pi * min(1.0, (step + 1) / num_steps))


def distillation_loss(backbone: Backbone, hidden: Tensor, teacher_hidden: Tensor) -> Tensor:
    """Sum over the rows of KL(original || trained): self-distillation's L_LM (section 2.3.2), by which the
    backbone keeps its answers. hidden, teacher_hidden: [num_rows, hidden], of answer positions only.
    """

    def block(rows: Tensor, teacher_rows: Tensor) -> Tensor:
        student = backbone.logits(rows).float().log_softmax(dim=-1)
        teacher = backbone.teacher_logits(teacher_rows).float().log_softmax(dim=-1)
        return F.kl_div(student, teacher, reduction="sum", log_target=True)

    return _in_blocks(block, hidden, teacher_hidden)


def language_loss(backbone: Backbone, hidden: Tensor, next_tokens: Tensor) -> Tensor:
    """Sum over the rows of -log p(next token): the plain L_LM (section 2.2.2), for text that someone else
    wrote and the model is to learn. hidden: [num_rows, hidden]; next_tokens: [num_rows] int64.
    """

    def block(rows: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(backbone.logits(rows).float(), targets, reduction="sum")

    return _in_blocks(block, hidden, next_tokens)


def head_losses(heads: DraftHeads, features: Sequence[Tensor], columns: Tensor, projection: Tensor) -> Tensor:
    """Sum over the rows of -log p(target) by head, [num_heads] float32.

    features: per head [num_rows, hidden]; columns: [num_rows, num_heads] int64, each target's column of the
    projection, -1 for none; projection: [num_tokens, hidden] without gradient, not read by heads that bring
    their own.
    """
    projection = projection.to(_product_dtype(features[0]))
    sums = []
    for head in range(heads.num_heads):
        known = columns[:, head] >= 0
        rows, weight = projected(heads, head, features[head][known], projection)
        targets = columns[known, head]
        # Under autocast the products would have two number formats.
        with torch.autocast(rows.device.type, enabled=False):
            if heads.projection_kind == "shared":
                sums.append(frozen_projection_loss(rows, weight, weight[targets]))
            else:
                sums.append(vocabulary_loss(rows, weight, targets))
    return torch.stack(sums)


def _product_dtype(features: Tensor) -> torch.dtype:
    """The format in which a linear layer would multiply these features."""
    device = features.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else features.dtype


def _in_blocks(loss: Callable[[Tensor, Tensor], Tensor], first: Tensor, second: Tensor) -> Tensor:
    """Sum of the loss over blocks of rows; the logits of a block are computed again for its gradient instead
    of being kept."""
    total = torch.zeros((), dtype=torch.float32, device=first.device)
    for begin in range(0, len(first), ROWS_PER_BLOCK):
        block = slice(begin, begin + ROWS_PER_BLOCK)
        total = total + checkpoint(loss, first[block], second[block], use_reentrant=False)
    return total
