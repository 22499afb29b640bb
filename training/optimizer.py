"""The optimizer of heads: Muon for the matrices inside them, AdamW for everything else.

Muon's update is the orthogonal matrix nearest to the momentum, by a Newton-Schulz iteration (Jordan et al.,
2024, kellerjordan.github.io/posts/muon). It is scaled to the size of AdamW's updates, so that one learning
rate serves both (Liu et al., "Muon is Scalable for LLM Training", arXiv 2502.16982, section 2.2). As in that
paper, AdamW updates the projections onto the vocabulary.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import AdamW, Muon

from heads.base import DraftHeads

WEIGHT_DECAY = 0.05


class HeadsOptimizer:
    """Updates the parameters of heads in place. They must be on their device before."""

    def __init__(self, heads: DraftHeads) -> None:
        of_vocabulary = {id(p) for p in (heads.projection, heads.reduce, heads.expand) if p is not None}
        inside = [
            p
            for name, p in heads.named_parameters()
            if p.ndim > 1 and id(p) not in of_vocabulary and not name.startswith("biases")
        ]
        taken = {id(p) for p in inside}
        rest = [p for p in heads.parameters() if id(p) not in taken]
        # Matrices of several heads may be stacked, [..., out, in]; Muon takes them one by one.
        self._stacked = [(p, [nn.Parameter(m) for m in p.data.flatten(0, -3)]) for p in inside if p.ndim > 2]
        matrices = [p for p in inside if p.ndim == 2] + [m for _, parts in self._stacked for m in parts]
        self._optimizers = [
            Muon(matrices, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"),
            *([AdamW(rest, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY, fused=True)] if rest else []),
        ]

    def step(self, lr: float) -> None:
        """One update by the gradients that the parameters hold."""
        for parameter, parts in self._stacked:
            if parameter.grad is not None:
                for part, grad in zip(parts, parameter.grad.flatten(0, -3), strict=True):
                    part.grad = grad
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        for _, parts in self._stacked:
            for part in parts:
                part.grad = None

    def state_dict(self) -> list[dict[str, Any]]:
        return [optimizer.state_dict() for optimizer in self._optimizers]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        for optimizer, state in zip(self._optimizers, states, strict=True):
            optimizer.load_state_dict(state)
