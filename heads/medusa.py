"""Medusa heads: several guesses at the tokens after the next one, each from the same hidden row.

A head is n residual blocks `x + SiLU(Wx + b)` followed by a vocabulary projection: its own, or the base
model's `lm_head`, whole or cut to the most frequent tokens (the token map). The blocks of all heads are
stacked, so that a pass over every head is one batched product per layer and one product for the projection.

With a root input, the first block also sees the token that was just committed, which is known when the heads
run: `x + SiLU(Wx + Ue + b)`, e its embedding brought to unit mean square. This is the first step of Hydra
(arXiv 2402.05109), the one that costs nothing: heads still do not depend on each other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heads.base import DraftHeads, ProjectionKind
from heads.errors import HeadsError


class MedusaHeads(DraftHeads):
    """`num_heads` heads of `num_layers` blocks over rows of `hidden_size`.

    root_input: the first block sees the committed root. What remains is as in DraftHeads.
    """

    architecture = "medusa"

    def __init__(
        self,
        num_heads: int,
        num_layers: int,
        hidden_size: int,
        vocab_size: int,
        token_map: Tensor | None = None,
        projection: ProjectionKind = "shared",
        rank: int = 0,
        root_input: bool = False,
    ) -> None:
        super().__init__(num_heads, hidden_size, vocab_size, token_map, projection, rank)
        self.num_layers = num_layers
        # Zero weights make a fresh head guess what the base model itself guesses.
        self.weights = nn.ParameterList(
            nn.Parameter(torch.zeros(num_heads, hidden_size, hidden_size)) for _ in range(num_layers)
        )  # [layer][num_heads, out, in]
        self.biases = nn.ParameterList(
            nn.Parameter(torch.zeros(num_heads, hidden_size)) for _ in range(num_layers)
        )
        self.root_weights = (
            nn.Parameter(torch.zeros(num_heads, hidden_size, hidden_size)) if root_input else None
        )  # [num_heads, out, in]

    def facts(self) -> dict[str, object]:
        return {"num_layers": self.num_layers, "root_input": self.root_weights is not None}

    @property
    def kind(self) -> str:
        root = ", seeing the root" if self.root_weights is not None else ""
        return f"{self.num_heads} Medusa heads x {self.num_layers} layers{root}"

    def features(self, hidden: Tensor, num_heads: int, root_rows: Tensor | None = None) -> Tensor:
        """What the first heads project, [num_heads, num_rows, hidden].

        hidden: [num_rows, hidden]; root_rows: [num_rows, hidden] embeddings of the roots, as the base has
        them, needed with a root input.
        """
        x = hidden.expand(num_heads, -1, -1)
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            y = torch.baddbmm(bias[:num_heads, None], x, weight[:num_heads].transpose(1, 2))
            if layer == 0 and self.root_weights is not None:
                if root_rows is None:
                    raise HeadsError("these heads see the committed root; call bind() first")
                roots = F.rms_norm(root_rows, (self.hidden_size,)).expand(num_heads, -1, -1)
                y = torch.baddbmm(y, roots, self.root_weights[:num_heads].transpose(1, 2))
            x = x + F.silu(y)
        return x

    def sequence_features(self, hidden: Tensor, embeddings: Tensor, anchors: Tensor) -> Sequence[Tensor]:
        roots = embeddings.flatten(0, 1)[anchors + 1] if self.root_weights is not None else None
        return self.features(hidden.flatten(0, 1)[anchors], self.num_heads, roots).unbind()

    def logits(self, hidden: Tensor, roots: Tensor, num_heads: int) -> Tensor:
        """Guesses of bound heads, [num_heads, num_rows, num_tokens], columns in token map order.

        hidden: [num_rows, hidden]; roots: [num_rows] int64, the token committed after each row.
        """
        root_rows = None
        if self.root_weights is not None and self.embedding is not None:
            root_rows = F.embedding(roots, self.embedding)
        x = self.features(hidden, num_heads, root_rows)
        if self.projection is not None:
            return torch.bmm(x, self.projection[:num_heads].transpose(1, 2))
        if self.project is None:
            raise HeadsError("these heads share the base's projection; call bind() first")
        return self.project(x if self.reduce is None else F.linear(x, self.reduce))

    def begin(self, hidden: Tensor, roots: Tensor, num_heads: int) -> Tensor:
        return self.logits(hidden, roots, num_heads)

    def follow(self, head: int, state: Tensor, tokens: Tensor, origins: Tensor) -> tuple[Tensor, Tensor]:
        """The same guesses for every path: a Medusa head does not see its own."""
        return state[head].unsqueeze(1), state
