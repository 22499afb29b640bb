"""The drafting interface: drafters propose, the tree verifies, the engine does not know which one guessed."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engine.model.config import DecoderConfig
from engine.model.decoder import Attention
from engine.runner.kv_cache import KVCache
from engine.runner.step_input import StepInput
from engine.scheduling.batch import ScheduledRequest
from engine.scheduling.ngrams import Chain
from engine.scheduling.request import Request
from trees.select import Chains
from trees.verify import DraftTrees


@dataclass(frozen=True)
class DraftInput:
    """What a drafter may go by, for the requests of a step that have a budget of drafts.

    The root of request i lies at position `len(requests[i].token_ids) - 1`, and every position before it has
    its KV in the cache.
    """

    requests: Sequence[Request]
    chains: Sequence[Chain]  # n-gram guesses of each request, for drafters that take them
    budgets: Sequence[int]  # nodes of each tree, root included
    least: Sequence[float]  # of each request: the least probability that is worth a node
    chain_only: bool  # whether the chains are all that is wanted
    hidden: Tensor  # [num_requests, hidden], the base's row that each root was drawn from
    roots: Tensor  # [num_requests] int64 token ids

    @property
    def max_nodes(self) -> int:
        """The largest budget."""
        return max(self.budgets)


@dataclass(frozen=True)
class Proposal:
    """Trees of up to `max_nodes` columns. What lies past a request's nodes is not read, but is valid all the
    same: token ids of the vocabulary, parents that come before their children."""

    tokens: Tensor  # [num_requests, max_nodes] int64, column 0 the roots themselves; siblings differ
    parents: Tensor  # [num_requests, max_nodes] int64, the root's is itself; each node after its parent
    max_depth: int  # a bound that the host knows
    num_nodes: Sequence[int] | None = None  # root included, where some trees are smaller than their budgets


@dataclass(frozen=True)
class RootRows:
    """What a drafter may go by where nothing but tensors tells: all requests of a pass that decodes, those
    without drafts and padding among them. What is guessed for these nobody reads."""

    hidden: Tensor  # [num_requests, hidden], the base's row that each root was drawn from
    roots: Tensor  # [num_requests] int64 token ids
    positions: Tensor  # [num_requests] int64, the roots'
    num_nodes: Tensor  # [num_requests] int64, of each tree, root included
    max_nodes: int  # of any tree
    levels: int  # of guesses
    chains: Chains
    attention: Attention | None  # of the roots, where the drafter asks for one


class Drafter(Protocol):
    """Fills trees with guesses. It sees the committed root, so a guess may depend on the path before it.

    A drafter inherits from this class. One with KV of its own asks for `num_cache_layers` more layers of the
    base's shape in the base's cache, where compaction moves them along, or keeps `cache_bytes_per_token`
    elsewhere, under the same slots.
    """

    takes_chains: bool = False  # whether it makes use of n-gram guesses
    num_levels: int = 0  # of guesses that take time of their own
    trims: bool = False  # whether it leaves out what is less likely than `DraftInput.least`
    num_cache_layers: int = 0
    cache_bytes_per_token: int = 0
    # Whether `observe` reads nothing of a pass without prompts but its tensors, and waits for none of them,
    # so that a CUDA graph may hold it.
    observes_tensors: bool = True

    def attach(self, config: DecoderConfig, cache: KVCache) -> None:
        """Called before the first pass, and again where the cache changes its size: the base model, and the
        cache whose last `num_cache_layers` layers are the drafter's."""
        return

    def limit(self, scheduled: ScheduledRequest) -> int:
        """How many of the draft tokens it has guesses for. Asked before a pass is laid out: what has no guess
        takes no row of it."""
        return scheduled.num_drafts

    def can_grow(self) -> bool:
        """Whether `grow` may take the place of `propose` where `DraftInput.chain_only` is not set, so that a
        CUDA graph may hold it: it reads nothing but tensors, and waits for none of them."""
        return False

    @property
    def root_heads(self) -> int | None:
        """Query heads of the attention that `grow` has read at the roots; None where it needs none."""
        return None

    def grow(self, rows: RootRows) -> tuple[Tensor, Tensor]:
        """`propose` on tensors alone: tokens and parents as in `Proposal`. Only where `can_grow` says so."""
        raise TypeError(f"{type(self).__name__} guesses by propose() alone")

    @abstractmethod
    def propose(self, draft: DraftInput) -> Proposal:
        """Guesses for every node."""

    def observe(
        self, step: StepInput, trees: DraftTrees, hidden: Tensor, rows_before: Callable[[], Tensor]
    ) -> None:
        """Called after every pass of the base, before accepted nodes are moved.

        hidden: [num_tokens, hidden], the base's rows after its final norm; rows_before() gives the row before
        each request's first in the pass, [num_requests, hidden], zeros where there is none or it is not known
        (a prefix from the cache).
        """
        return


def chain_parents(tokens: Tensor) -> Tensor:
    """Parents of trees without branches, for tokens of [num_requests, num_nodes], int64 of the same shape."""
    return torch.arange(-1, tokens.shape[1] - 1, device=tokens.device).clamp_(min=0).expand_as(tokens)
