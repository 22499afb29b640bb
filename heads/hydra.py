"""Hydra heads: each head also sees the tokens that its path has guessed, the committed root first.

After Ankner et al., "Hydra: Sequentially-Dependent Draft Heads for Medusa Decoding" (arXiv 2402.05109), in
its better variant: behind a prefix layer, heads follow one another, each taking its predecessor's features
and the embedding of the token guessed last.

    head k  s_k = s_{k-1} + SiLU(A_k rms(s_{k-1}) + B_k rms(e_k) + b_k), e_k the path's last token

s_{-1} is what the prefix layer (`heads.prefix`) starts a root with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heads.base import DraftHeads, ProjectionKind, plain_linear
from heads.errors import HeadsError
from heads.prefix import PrefixLayer, rms


class HydraHeads(DraftHeads):
    """`num_heads` dependent heads behind a prefix layer. What remains is as in DraftHeads."""

    architecture = "hydra"

    def __init__(
        self,
        num_heads: int,
        vocab_size: int,
        prefix: PrefixLayer,
        token_map: Tensor | None = None,
        projection: ProjectionKind = "shared",
        rank: int = 0,
    ) -> None:
        size = prefix.gate_up.in_features
        super().__init__(num_heads, size, vocab_size, token_map, projection, rank)
        self.prefix = prefix
        # A and B side by side. Zero makes a fresh head guess what the base model itself guesses.
        self.weights = nn.Parameter(torch.zeros(num_heads, size, 2 * size))  # [num_heads, out, in]
        self.biases = nn.Parameter(torch.zeros(num_heads, size))
        self._products: list[Callable[[Tensor], Tensor]] = []

    @property
    def prefix_layer(self) -> PrefixLayer:
        return self.prefix

    def facts(self) -> dict[str, object]:
        prefix = self.prefix
        return {
            "prefix_heads": prefix.num_heads,
            "prefix_kv_heads": prefix.num_kv_heads,
            "prefix_head_dim": prefix.head_dim,
            "prefix_intermediate_size": prefix.down.in_features,
        }

    @property
    def kind(self) -> str:
        return f"{self.num_heads} Hydra heads behind a prefix layer"

    def bind(
        self,
        lm_head_weight: Tensor,
        embedding: Tensor,
        make_linear: Callable[[Tensor], Callable[[Tensor], Tensor]] = plain_linear,
    ) -> None:
        super().bind(lm_head_weight, embedding, make_linear)
        self.prefix.bind(make_linear)
        self._products = [make_linear(weight) for weight in self.weights.detach()]

    def advance(self, head: int, features: Tensor, embeddings: Tensor) -> Tensor:
        """s_k from s_{k-1} [..., hidden] and the embeddings [..., hidden] of the paths' last tokens."""
        x = torch.cat((rms(features), rms(embeddings)), dim=-1)
        if self._products:
            return features + F.silu(self._products[head](x) + self.biases[head])
        return features + F.silu(F.linear(x, self.weights[head], self.biases[head]))

    def sequence_features(self, hidden: Tensor, embeddings: Tensor, anchors: Tensor) -> Sequence[Tensor]:
        features = self.prefix(hidden, embeddings).flatten(0, 1)[anchors]
        flat = embeddings.flatten(0, 1)
        all_features = []
        for head in range(self.num_heads):
            path = (anchors + 1 + head).clamp(max=len(flat) - 1)
            features = self.advance(head, features, flat[path])
            all_features.append(features)
        return all_features

    def begin(self, hidden: Tensor, roots: Tensor, num_heads: int) -> Tensor:
        return hidden.unsqueeze(1)

    def follow(self, head: int, state: Tensor, tokens: Tensor, origins: Tensor) -> tuple[Tensor, Tensor]:
        if self.embedding is None:
            raise HeadsError("these heads see the tokens of their path; call bind() first")
        features = state.gather(1, origins.unsqueeze(2).expand(-1, -1, self.hidden_size))
        state = self.advance(head, features, F.embedding(tokens, self.embedding))
        logits = self.head_logits(head, state.flatten(0, 1))
        return logits.view(*tokens.shape, -1), state
