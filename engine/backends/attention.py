"""Attention that stays in its place on the device, so that one CUDA graph serves many passes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor

from engine.backends.rows import PassShape, PassSize
from engine.model.layers import Attention


@dataclass(frozen=True)
class FixedAttention:
    """Attention that is made once for passes up to a size. `load` tells it of a pass, without rows of
    padding; what `attention` computes with lies in the same places ever after. Rows may see less than `load`
    was told: what is in `prefix_len` when it computes."""

    attention: Attention
    load: Callable[[PassShape], None]
    prefix_len: Tensor  # [num_tokens] integers


# From a size, the number of query heads, and slots and ancestors, both [num_tokens]
MakeAttention = Callable[[PassSize, int, Tensor, Tensor], FixedAttention]


class FixedAttentions(ABC):
    """Makes them over one cache, for requests up to one length. No two of them may run at once."""

    @abstractmethod
    def make(self, size: PassSize, num_heads: int, slots: Tensor, ancestors: Tensor) -> FixedAttention:
        """One for passes up to this size. num_heads: query heads; slots, ancestors: [num_tokens] int64, which
        stay where they are; a row of padding has a negative slot, stores nothing and reads zeros."""

    @abstractmethod
    def kept_bytes(self, sizes: Iterable[tuple[PassSize, int]]) -> int:
        """Bytes of memory that they would keep together, made for these sizes and numbers of query heads."""
