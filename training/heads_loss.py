"""The loss of heads: one cross-entropy per head, over the cached rows of whole conversations.

The target is the token of the text, or the base's whole distribution at that place, which says more about
every position (the teacher loss of Hydra++, arXiv 2402.05109, section 4.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from heads.base import DraftHeads
from training.sequences import SequenceBatch
from training.vocabulary_loss import distributions, frozen_projection_loss, mean_rows, vocabulary_loss

# Heads after the first learn at only some of the anchors. Neighbouring anchors teach nearly the same, and
# without them a step takes little more than half the time, which allows more passes over the text.
LATER_HEADS_EVERY = 3


@dataclass(frozen=True)
class _Teacher:
    """The base's own predictions at the places that any head guesses at."""

    index: Tensor  # [num_flat_rows] int64: a flat row's place in what follows
    says: Tensor  # [num_places, hidden] mean rows, or [num_places, num_tokens] distributions


def token_columns(token_map: Tensor | None, vocab_size: int) -> Tensor:
    """[vocab + 1] int64: each token's column of the projection, -1 where it has none; the last entry is for
    token -1, which stands for no target."""
    columns = torch.full((vocab_size + 1,), -1, dtype=torch.int64)
    tokens = torch.arange(vocab_size) if token_map is None else token_map.cpu()
    columns[tokens] = torch.arange(len(tokens))
    return columns


def projected(heads: DraftHeads, head: int, features: Tensor, projection: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and weight of a head's logits, both in the dtype of `projection`, the base's [num_tokens, hidden],
    which is the weight of heads that bring none. features: [num_rows, hidden].
    """
    rows, weight = heads.projected(head, features)
    return rows.to(projection.dtype), projection if weight is None else weight.to(projection.dtype)


class HeadsLoss:
    """The loss of heads that share the device and the number format of `lm_head_weight`.

    embedding, lm_head_weight: [vocab, hidden], the base's; soft: whether targets are its distributions.
    """

    def __init__(self, heads: DraftHeads, embedding: Tensor, lm_head_weight: Tensor, *, soft: bool) -> None:
        self.heads, self.embedding, self.soft = heads, embedding, soft
        self.projection = heads.mapped(lm_head_weight)  # [num_tokens, hidden]
        self._columns = token_columns(heads.token_map, len(lm_head_weight)).to(embedding.device)
        self._learns = heads.projection_kind != "shared"

    def features(self, batch: SequenceBatch) -> Sequence[Tensor]:
        """What each head projects, [num_anchors, hidden] each; weights stay float32."""
        hidden, embeddings = batch.hidden.to(self.projection.dtype), self.embedding[batch.token_ids]
        with self._autocast():
            return self.heads.sequence_features(hidden, embeddings, batch.anchors)

    def counts(self, batch: SequenceBatch, step: int) -> Tensor:
        """How many anchors of the batch each head learns at in this step, [num_heads] int64."""
        return torch.stack([self._learned(batch, head, step).sum() for head in range(self.heads.num_heads)])

    def sums(self, batch: SequenceBatch, step: int) -> Tensor:
        """Cross-entropy of each head, summed over the anchors that it learns at in this step, [num_heads]
        float32."""
        teacher = self._teacher(batch) if self.soft else None
        totals = []
        for head, features in enumerate(self.features(batch)):
            learned = self._learned(batch, head, step)
            rows, weight = self._projected(head, features[learned])
            # The row of token t + 1 + k is the base's prediction of token t + 2 + k.
            place = batch.anchors[learned] + 1 + head
            columns = self._columns[batch.targets(head)[learned]]
            wanted = columns if teacher is None else teacher.index[place]
            if self._learns:
                says = None if teacher is None else teacher.says
                totals.append(vocabulary_loss(rows, weight, wanted, says))
            else:
                says = weight if teacher is None else teacher.says
                totals.append(frozen_projection_loss(rows, weight, says[wanted]))
        return torch.stack(totals)

    def _learned(self, batch: SequenceBatch, head: int, step: int) -> Tensor:
        """[num_anchors] bool: where the head has a target; those after the first take a share of these."""
        known = self._columns[batch.targets(head)] >= 0
        if head == 0:
            return known
        places = batch.anchors % batch.token_ids.shape[1]  # the same however a step is cut into pieces
        return known & ((places + head + step) % LATER_HEADS_EVERY == 0)

    @torch.no_grad()
    def hits(self, batch: SequenceBatch) -> tuple[Tensor, Tensor]:
        """How often each head's likeliest token is the text's, and how many targets the text has, both
        [num_heads] int64."""
        right, total = [], []
        for head, features in enumerate(self.features(batch)):
            targets = batch.targets(head)
            rows, weight = self._projected(head, features)
            guesses = (rows @ weight.t()).argmax(dim=1)
            right.append((guesses == self._columns[targets])[targets >= 0].sum())
            total.append((targets >= 0).sum())
        return torch.stack(right), torch.stack(total)

    def _autocast(self) -> torch.autocast:
        dtype = self.projection.dtype
        return torch.autocast(self.projection.device.type, dtype, enabled=dtype != torch.float32)

    def _projected(self, head: int, features: Tensor) -> tuple[Tensor, Tensor]:
        with self._autocast():
            return projected(self.heads, head, features, self.projection)

    def _teacher(self, batch: SequenceBatch) -> _Teacher:
        hidden = batch.hidden.flatten(0, 1)
        asked = torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device)
        for head in range(self.heads.num_heads):
            asked[(batch.anchors + 1 + head)[batch.targets(head) >= 0]] = True
        says = distributions if self._learns else mean_rows
        return _Teacher(asked.cumsum(0) - 1, says(hidden[asked].to(self.projection.dtype), self.projection))
