"""A decoder: a list of layers between the embedding and the projection onto the vocabulary.

It knows nothing of requests, trees or the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.model.config import DecoderConfig, LayerSpec, RopeSpec, refuse_unknown
from engine.model.layers import ACTIVATIONS, Attention, DecoderLayer, Layer, Linear, RMSNorm, Rotation
from engine.model.rope import rope_table

# How a layer is made of its specification, the hidden size and its number, by the kind that it names.
LAYER_KINDS: dict[str, Callable[[LayerSpec, int, int], Layer]] = {"decoder": DecoderLayer}

_KNOWN = {
    "norms of kind 'rms'",
    "norms of queries and keys",
    "biases",
    "several epsilons of norms",
    "several widths of feed-forward",
    "several rotary embeddings",
    "layers without rotary embedding",
    "a scale on embeddings",
    "a scale on logits",
    "a softcap on logits",
}


def check_runs(config: DecoderConfig) -> None:
    """Raises ModelError for what the decoder, or the attention it is given, does not do."""
    kinds = {f"layers of kind {kind!r}" for kind in LAYER_KINDS}
    activations = {f"feed-forward of kind {kind!r}" for kind in ACTIVATIONS}
    refuse_unknown(config, _KNOWN | kinds | activations, "the decoder")


def make_layer(config: DecoderConfig, number: int) -> Layer:
    spec = config.layers[number]
    return LAYER_KINDS[spec.kind](spec, config.hidden_size, number)


class RopeTable(nn.Module):
    """Cosines and sines of every position."""

    cos: Tensor  # [max_positions, head_dim]
    sin: Tensor  # [max_positions, head_dim], first half negated

    def __init__(self, rope: RopeSpec, head_dim: int, max_positions: int) -> None:
        super().__init__()
        cos, sin = rope_table(rope, head_dim, max_positions)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> Rotation:
        return self.cos[positions].unsqueeze(1).to(dtype), self.sin[positions].unsqueeze(1).to(dtype)


class Decoder(nn.Module):
    """Embedding, layers, final norm and vocabulary projection of one checkpoint.

    Raises ModelError as `check_runs` does.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        check_runs(config)
        self.config = config
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size), requires_grad=False)
        self.layers = nn.ModuleList(make_layer(config, number) for number in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.final_norm.eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embedding
        self.ropes = nn.ModuleList(
            RopeTable(rope, config.head_dim, config.max_positions) for rope in config.ropes
        )
        ropes = [spec.attention.rope for spec in config.layers]
        self._rope_of = [None if rope is None else config.ropes.index(rope) for rope in ropes]

    def forward(
        self, token_ids: Tensor, positions: Tensor, attention: Attention, taps: Sequence[int] = ()
    ) -> Tensor:
        """Hidden rows after the final norm, [num_tokens, hidden].

        token_ids, positions: [num_tokens] int64. taps: numbers of layers, in ascending order. Where there
        are any, a row goes on with what each of them gave: [num_tokens, (1 + number of taps) * hidden].
        """
        x = F.embedding(token_ids, self.embedding)
        if self.config.embedding_scale != 1.0:
            x = x * self.config.embedding_scale
        rotations = [table(positions, x.dtype) for table in self.ropes]
        tapped = []
        for layer, rope in zip(self.layers, self._rope_of, strict=True):
            x = layer(x, None if rope is None else rotations[rope], attention)
            if layer.number in taps:
                tapped.append(x)
        hidden: Tensor = self.norm(x)
        return torch.cat((hidden, *tapped), dim=-1) if tapped else hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [num_rows, hidden] -> [num_rows, vocab_size], in the model's own dtype."""
        logits: Tensor = self.lm_head(hidden)
        if self.config.logit_scale != 1.0:
            logits = logits * self.config.logit_scale
        cap = self.config.logit_softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap
