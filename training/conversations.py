"""Whole conversations as padded batches that mark the answers, for the backbone in joint training.

The batch of a step is a function of (seed, step) alone. So a run that was killed and continued sees the same
text as an unbroken one, on one device or on several.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from training.dataset import Document


@dataclass(frozen=True)
class ConversationBatch:
    """Right-padded conversations.

    A row is the place before an answer token, as at serving. Its hidden state predicts `next_tokens`. Head k
    knows that token as its root and predicts the token k + 1 places after it.
    """

    token_ids: Tensor  # [num_documents, length] int64, padded with 0 at the end
    rows: Tensor  # [num_rows] int64, places in the flattened token_ids
    next_tokens: Tensor  # [num_rows] int64
    targets: Tensor  # [num_rows, num_heads] int64 token ids, -1 beyond the end of the answer

    def to(self, device: torch.device) -> ConversationBatch:
        """The same on another device."""
        return ConversationBatch(
            *(t.to(device) for t in (self.token_ids, self.rows, self.next_tokens, self.targets))
        )


def make_batch(documents: Sequence[Document], num_heads: int) -> ConversationBatch:
    """The documents as one batch on the CPU. No target lies outside the answer that its row belongs to."""
    length = max(len(d.token_ids) for d in documents)
    token_ids = torch.zeros(len(documents), length, dtype=torch.int64)
    rows, next_tokens, targets = [], [], []
    for i, document in enumerate(documents):
        tokens = torch.tensor(document.token_ids)
        token_ids[i, : len(tokens)] = tokens
        for start, end in document.spans:
            rows.append(i * length + torch.arange(start - 1, end - 1))
            next_tokens.append(tokens[start:end])
            places = torch.arange(start, end).unsqueeze(1) + torch.arange(1, num_heads + 1)
            targets.append(tokens[places.clamp(max=end - 1)].masked_fill(places >= end, -1))
    return ConversationBatch(token_ids, torch.cat(rows), torch.cat(next_tokens), torch.cat(targets))


class BatchPlan:
    """Which documents make up which step, and how a step is cut into passes."""

    def __init__(self, documents: Sequence[Document], batch: int, seed: int) -> None:
        self.documents, self.batch, self.seed = documents, batch, seed
        self.steps_per_epoch = len(documents) // batch
        self._epoch = -1
        self._order: list[int] = []

    def step(self, step: int, num_passes: int) -> list[list[Document]]:
        """The documents of a step in `num_passes` groups of equal number, with similar lengths together.

        The batch size is a multiple of `num_passes`.
        """
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 100_003 + epoch)
            self._order = torch.randperm(len(self.documents), generator=generator).tolist()
            self._epoch = epoch
        chosen = self._order[place * self.batch : (place + 1) * self.batch]
        chosen.sort(key=lambda i: (len(self.documents[i].token_ids), i))
        size = self.batch // num_passes
        return [
            [self.documents[i] for i in chosen[begin : begin + size]] for begin in range(0, self.batch, size)
        ]
