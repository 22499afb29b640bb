"""What the rest of the engine sees of a decoder, in whatever form a backend runs it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor, nn

from engine.model.config import DecoderConfig
from engine.model.layers import Attention


class RunningDecoder(Protocol):
    """A decoder that runs over one flat row of tokens."""

    @property
    def config(self) -> DecoderConfig: ...

    @property
    def embedding(self) -> Tensor:
        """[vocab, hidden], in the model's number format and on its device."""

    @property
    def layers(self) -> nn.Module: ...

    @property
    def norm(self) -> nn.Module: ...

    @property
    def lm_head(self) -> nn.Module: ...

    def __call__(
        self, token_ids: Tensor, positions: Tensor, attention: Attention, taps: Sequence[int] = ()
    ) -> Tensor:
        """Hidden rows, as `engine.model.decoder.Decoder.forward` has them; what goes in is contiguous."""

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [num_rows, hidden] -> [num_rows, vocab]"""
