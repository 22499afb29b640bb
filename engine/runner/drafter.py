"""The drafting interface: drafters propose, the tree verifies, the engine does not know which one guessed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.backends.growing import GrowRows
from engine.backends.kv_cache import KVCache
from engine.batch import RequestState, ScheduledRequest
from engine.errors import ConfigError
from engine.model.config import DecoderConfig
from engine.model.layers import Attention
from engine.runner.step_input import StepInput
from trees.verify import DraftTrees


@dataclass(frozen=True, kw_only=True)
class RootRows(GrowRows):
    """What a drafter may go by: the roots of requests that have drafts in the coming pass.

    A root's position is that of its request's last known token; every position before it has its KV in the
    cache. In a CUDA graph all requests of a bucket are among them, those without drafts and padding too: what
    is guessed for these nobody reads.
    """

    hidden: Tensor  # [num_requests, hidden], the base's row that each root was drawn from
    positions: Tensor  # [num_requests] int64, the roots'
    attention: Attention | None  # over the roots, with the drafter's `root_heads`, where it has any
    requests: Sequence[RequestState] = ()  # empty in a CUDA graph


@dataclass(frozen=True)
class Proposal:
    """Trees of up to `max_nodes` columns. What lies past a request's nodes is not read, but is valid all the
    same: token ids of the vocabulary, parents that come before their children."""

    tokens: Tensor  # [num_requests, max_nodes] int64, column 0 the roots themselves; siblings differ
    parents: Tensor  # [num_requests, max_nodes] int64, the root's is itself; each node after its parent
    max_depth: int  # a bound that the host knows
    num_nodes: Tensor | None = None  # [num_requests] int64, root included, where `RootRows.least` was given


class Drafter(ABC):
    """Fills trees with guesses. It sees the committed root, so a guess may depend on the path before it.

    One with KV of its own asks for `num_cache_layers` more layers of the base's shape in the base's cache,
    where compaction moves them along, or keeps `cache_bytes_per_token` elsewhere, under the same slots.
    """

    # Layers of the base, in ascending order, whose rows it asks for. They follow the row after the final norm
    # in each row of `hidden` that it is given: [..., (1 + number of taps) * hidden].
    taps: tuple[int, ...] = ()
    takes_chains: bool = False  # whether guesses of the host join its own
    num_levels: int = 0  # of guesses that take time of their own
    root_heads: int | None = None  # query heads of its attention over the roots, where it has one
    num_cache_layers: int = 0
    cache_bytes_per_token: int = 0
    # Whether `grow`, and `observe` of a pass without prompts, read nothing but tensors and wait for none: a
    # CUDA graph may hold them.
    capturable: bool = True
    # Whether it leaves out what is less likely than `RootRows.least`.
    trims: bool = False

    def attach(self, config: DecoderConfig, cache: KVCache) -> None:
        """Called before the first pass, and again where the cache changes its size: the base model, and the
        cache whose last `num_cache_layers` layers are the drafter's."""
        return

    @abstractmethod
    def limit(self, scheduled: ScheduledRequest) -> int:
        """How many of the draft tokens it has guesses for. Asked before a pass is laid out: what has no guess
        takes no row of it."""

    @abstractmethod
    def grow(self, rows: RootRows) -> Proposal:
        """A tree for every request."""

    def observe(
        self, step: StepInput, trees: DraftTrees, hidden: Tensor, rows_before: Callable[[], Tensor]
    ) -> None:
        """Called after every pass of the base, before accepted nodes are moved.

        hidden: [num_tokens, hidden], the base's rows after its final norm; rows_before() gives the row before
        each request's first in the pass, [num_requests, hidden], zeros where there is none or it is not known
        (a prefix from the cache).
        """
        return


class NoDrafter(Drafter):
    """Guesses nothing."""

    def limit(self, scheduled: ScheduledRequest) -> int:
        return 0

    def grow(self, rows: RootRows) -> Proposal:
        return propose_chains(rows)  # of which there are none


class ChainDrafter(Drafter):
    """Guesses what the host does, for models without heads: a chain for each request whose last tokens have
    occurred before, nothing for the others."""

    takes_chains = True

    def limit(self, scheduled: ScheduledRequest) -> int:
        return min(scheduled.num_drafts, len(scheduled.chain.token_ids))

    def grow(self, rows: RootRows) -> Proposal:
        return propose_chains(rows)


class BlankDrafter(Drafter):
    """Guesses token 0 below every root, which takes no time: trees as large as they are asked for."""

    def limit(self, scheduled: ScheduledRequest) -> int:
        return scheduled.num_drafts

    def grow(self, rows: RootRows) -> Proposal:
        tokens = torch.nn.functional.pad(rows.roots.unsqueeze(1), (0, rows.max_nodes - 1))
        return Proposal(tokens, torch.zeros_like(tokens), 1)


def row_size(drafter: Drafter, config: DecoderConfig) -> int:
    """Numbers in a row of `hidden` as the drafter is given it. Raises ConfigError for taps that are none."""
    taps = drafter.taps
    if taps != tuple(sorted(set(taps) & set(range(config.num_layers)))):
        raise ConfigError(
            "drafter", f"asks for rows of layers {taps}; the model has layers 0 to {config.num_layers - 1}"
        )
    return (1 + len(taps)) * config.hidden_size


def propose_chains(rows: RootRows) -> Proposal:
    """Every request's chain as its tree."""
    drafts, width = rows.chains.token_ids, rows.max_nodes - 1
    tokens = torch.cat((rows.roots.unsqueeze(1), drafts[:, :width]), dim=1)
    tokens = torch.nn.functional.pad(tokens, (0, rows.max_nodes - tokens.shape[1]))
    return Proposal(tokens, chain_parents(tokens), width)


def chain_parents(tokens: Tensor) -> Tensor:
    """Parents of trees without branches, for tokens of [num_requests, num_nodes], int64 of the same shape."""
    return torch.arange(-1, tokens.shape[1] - 1, device=tokens.device).clamp_(min=0).expand_as(tokens)
