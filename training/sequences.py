"""Batches of whole conversations from the cache of hidden rows, with the anchors at which heads learn.

The conversations of a step are a function of the seed and the step alone. So a run that was killed and
continued sees the same text in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from training.hidden_states import HiddenCache

POOL_SIZE = 256  # conversations among which those of similar length are put together


@dataclass(frozen=True)
class SequenceBatch:
    """Conversations side by side, padded to the longest. Flat rows count through batch * length."""

    hidden: Tensor  # [batch, length, hidden] bfloat16
    token_ids: Tensor  # [batch, length] int64
    anchors: Tensor  # [num_anchors] int64: flat rows t whose root, token t + 1, the assistant wrote
    ends: Tensor  # [num_anchors] int64: flat row after the last token of that answer

    def to(self, device: torch.device) -> SequenceBatch:
        """The same on another device."""
        return SequenceBatch(*(t.to(device) for t in (self.hidden, self.token_ids, self.anchors, self.ends)))

    def targets(self, head: int) -> Tensor:
        """[num_anchors] int64: the token that this head (from 0) should guess, -1 beyond the answer."""
        places = self.anchors + 2 + head
        flat = self.token_ids.flatten()
        return flat[places.clamp(max=len(flat) - 1)].masked_fill(places >= self.ends, -1)


class Sequences:
    """The conversations of a cache, by number."""

    def __init__(self, cache: HiddenCache) -> None:
        self.cache = cache
        self.lengths: list[int] = (cache.documents[:, 1] - cache.documents[:, 0]).tolist()
        self._ends = torch.zeros(len(cache.token_ids), dtype=torch.int64)  # of the answer a token is in, or 0
        for start, end in cache.answers.tolist():
            self._ends[start:end] = end

    def plan(self, documents: Tensor, num_tokens: int, epochs: float, seed: int) -> list[list[int]]:
        """Document numbers of every step: batches of at most `num_tokens` tokens, padding included, and at
        least one conversation. documents: [num_chosen] int64."""
        steps: list[list[int]] = []
        for epoch in range(math.ceil(epochs)):
            generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
            order = documents[torch.randperm(len(documents), generator=generator)].tolist()
            batches = list(self.batches(order, num_tokens))
            steps += [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
        return steps[: max(1, round(len(steps) * epochs / math.ceil(epochs)))]

    def batches(self, documents: Sequence[int], num_tokens: int) -> Iterator[list[int]]:
        """The documents once, those of similar length together."""
        for begin in range(0, len(documents), POOL_SIZE):
            batch: list[int] = []
            for number in sorted(documents[begin : begin + POOL_SIZE], key=self.lengths.__getitem__):
                if batch and (len(batch) + 1) * self.lengths[number] > num_tokens:
                    yield batch
                    batch = []
                batch.append(number)
            if batch:
                yield batch

    def load(self, documents: Sequence[int]) -> SequenceBatch:
        """Read these documents' rows."""
        length = max(self.lengths[number] for number in documents)
        cache = self.cache
        hidden = cache.hidden.new_zeros(len(documents), length, cache.hidden.shape[1])
        token_ids = torch.zeros(len(documents), length, dtype=torch.int64)
        ends = torch.zeros(len(documents), length, dtype=torch.int64)
        for row, number in enumerate(documents):
            start, end = cache.documents[number].tolist()
            hidden[row, : end - start] = cache.hidden[start:end]
            token_ids[row, : end - start] = cache.token_ids[start:end]
            answer_ends = self._ends[start:end]
            ends[row, : end - start] = torch.where(answer_ends > 0, answer_ends - start + row * length, 0)
        root_ends = torch.cat((ends.flatten()[1:], ends.new_zeros(1)))
        # The first head needs a token after the root.
        anchors = torch.nonzero(root_ends > torch.arange(len(root_ends)) + 2).squeeze(1)
        return SequenceBatch(hidden, token_ids, anchors, root_ends[anchors])
