"""What all draft heads share: sizes, the projection onto the vocabulary, and what binds them to a base model.

Heads project with the base's `lm_head`, with a projection of their own each, or with a low-rank one that they
share. Each of these covers the whole vocabulary or only the most frequent tokens (the token map).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heads.errors import HeadsError
from heads.prefix import PrefixLayer

ProjectionKind = Literal["shared", "own", "low_rank"]


def plain_linear(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """A linear layer with weight [out, in], as torch computes it."""
    return partial(F.linear, weight=weight)


class DraftHeads(nn.Module):
    """Base of every architecture of heads.

    token_map: [num_tokens] int64, the tokens that guesses stand for; None for the whole vocabulary. rank: of
    a low-rank projection, else 0.
    """

    architecture: ClassVar[str]

    token_map: Tensor | None  # [num_tokens] int64
    project: Callable[[Tensor], Tensor] | None  # the base's projection of the mapped tokens, once bound
    embedding: Tensor | None  # [vocab, hidden], the base's, once bound

    def __init__(
        self,
        num_heads: int,
        hidden_size: int,
        vocab_size: int,
        token_map: Tensor | None = None,
        projection: ProjectionKind = "shared",
        rank: int = 0,
    ) -> None:
        super().__init__()
        self.num_heads, self.hidden_size, self.vocab_size = num_heads, hidden_size, vocab_size
        self.num_tokens = vocab_size if token_map is None else len(token_map)
        self.projection_kind: ProjectionKind = projection
        own, low = projection == "own", projection == "low_rank"
        self.projection = nn.Parameter(torch.zeros(num_heads, self.num_tokens, hidden_size)) if own else None
        self.reduce = nn.Parameter(torch.zeros(rank, hidden_size)) if low else None
        self.expand = nn.Parameter(torch.zeros(self.num_tokens, rank)) if low else None
        self.register_buffer("token_map", token_map)
        self.project = None
        self.register_buffer("embedding", None, persistent=False)

    @property
    def prefix_layer(self) -> PrefixLayer | None:
        """The layer that turns the base's rows into those that heads start from; None where there is none."""
        return None

    @abstractmethod
    def facts(self) -> dict[str, object]:
        """What config.json says of this architecture beyond what all heads have."""

    @property
    @abstractmethod
    def kind(self) -> str:
        """What these heads are, in words."""

    @abstractmethod
    def sequence_features(self, hidden: Tensor, embeddings: Tensor, anchors: Tensor) -> Sequence[Tensor]:
        """What each head projects where every path is the text itself: per head [num_anchors, hidden].

        hidden, embeddings: [batch, length, hidden]; anchors: [num_anchors] int64, flat rows t whose root is
        token t + 1. The caller leaves out targets beyond the end of a text.
        """

    @abstractmethod
    def begin(self, hidden: Tensor, roots: Tensor, num_heads: int) -> Tensor:
        """The state that bound heads draft from, before any guess.

        hidden: [num_requests, hidden], the base's row that each root was drawn from, or what the prefix layer
        has made of it; roots: [num_requests] int64; num_heads: how many will be asked.
        """

    @abstractmethod
    def follow(self, head: int, state: Tensor, tokens: Tensor, origins: Tensor) -> tuple[Tensor, Tensor]:
        """What a head makes of paths of `head` guessed tokens, and the state that the next head is given.

        state: of `begin`, or of the head before; tokens: [num_requests, num_paths] int64, each path's last
        token, the root for the first head; origins: the same shape, which path of the head before each goes
        on from. Returns logits [num_requests, num_paths, num_tokens], or one row for all paths in the place
        of num_paths where the head does not tell them apart.
        """

    @torch.inference_mode()
    def guess(
        self,
        head: int,
        state: Tensor,
        tokens: Tensor,
        origins: Tensor,
        num_guesses: int,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The likeliest tokens of `follow`, and their log-probabilities given the path.

        Returns token ids and float32, both [num_requests, num_paths, num_guesses] with the likeliest first,
        and the next state. noise: [num_requests, num_tokens] float32, which the coming draw adds to the
        base's logits; None for a greedy draw. With noise, other tokens are likely.
        """
        logits, state = self.follow(head, state, tokens, origins)
        if noise is not None:
            logits = logits.float() + noise.unsqueeze(1)
        best = logits.topk(min(num_guesses, self.num_tokens), dim=-1)
        log_probs = best.values.float() - logits.float().logsumexp(dim=-1, keepdim=True)
        # Rounding must not make a guess likelier than certain: then a child would outdo its parent.
        # NaN, which comes from an overflow of the number format, is no guess.
        log_probs = log_probs.clamp_(max=0.0).nan_to_num_(nan=-torch.inf, neginf=-torch.inf)
        guesses = best.indices if self.token_map is None else self.token_map[best.indices]
        shape = (*tokens.shape, -1)
        return guesses.expand(shape), log_probs.expand(shape), state

    def mapped(self, weight: Tensor) -> Tensor:
        """The rows of weight [vocab, ...] for the tokens of the token map, [num_tokens, ...]."""
        return weight if self.token_map is None else weight[self.token_map].contiguous()

    @torch.no_grad()
    def start_from(self, lm_head_weight: Tensor) -> None:
        """Start the heads' projections as the base's, or as near to it as their rank allows.

        lm_head_weight: [vocab, hidden].
        """
        weight = self.mapped(lm_head_weight.detach()).float()
        if self.projection is not None:
            self.projection.copy_(weight.expand_as(self.projection))
        if self.reduce is not None and self.expand is not None:
            rank = len(self.reduce)
            # The best approximation of a rank: the leading eigenvectors of W^T W (Eckart and Young).
            _, vectors = torch.linalg.eigh(weight.t() @ weight)
            leading = vectors[:, -rank:]  # [hidden, rank]
            self.reduce.copy_(leading.t())
            self.expand.copy_(weight @ leading)

    def bind(
        self,
        lm_head_weight: Tensor,
        embedding: Tensor,
        make_linear: Callable[[Tensor], Callable[[Tensor], Tensor]] = plain_linear,
    ) -> None:
        """Move to the base's device and dtype and take over what the heads share with it.

        lm_head_weight, embedding: [vocab, hidden]; make_linear turns the projection's weight into what
        multiplies by it. Raises HeadsError where the base has another shape.
        """
        expected = (self.vocab_size, self.hidden_size)
        if tuple(lm_head_weight.shape) != expected:
            raise HeadsError(
                f"the heads were made for a projection of {expected[0]} tokens by {expected[1]}, "
                f"but the model's is {' by '.join(map(str, lm_head_weight.shape))}"
            )
        self.to(device=lm_head_weight.device, dtype=lm_head_weight.dtype)
        if self.expand is not None:
            self.project = make_linear(self.expand.detach())
        elif self.projection is None:
            self.project = make_linear(self.mapped(lm_head_weight.detach()))
        self.embedding = embedding.detach()

    def projected(self, head: int, features: Tensor) -> tuple[Tensor, Tensor | None]:
        """What to multiply for one head's logits: rows [num_rows, size] and a weight [num_tokens, size].

        The weight is None where the heads use the base's. features: [num_rows, hidden].
        """
        if self.projection is not None:
            return features, self.projection[head]
        if self.reduce is not None:
            return F.linear(features, self.reduce), self.expand
        return features, None

    def head_logits(self, head: int, features: Tensor) -> Tensor:
        """One bound head's guesses, [num_rows, num_tokens]. features: [num_rows, hidden]."""
        rows, weight = self.projected(head, features)
        if self.project is not None:
            return self.project(rows)
        if weight is None:
            raise HeadsError("these heads share the base's projection; call bind() first")
        return F.linear(rows, weight)
