"""What draft heads ask of a backend: growing trees of their guesses, and a prefix layer over the cache."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from engine.backends.noise import Noise
from engine.backends.rows import PassInput
from engine.model.layers import Attention
from trees.select import Chains


@dataclass(frozen=True, kw_only=True)
class GrowRows:
    """The trees that are wanted, one for each of some requests."""

    roots: Tensor  # [num_requests] int64 token ids
    num_nodes: Tensor  # [num_requests] int64, of each tree, root included
    max_nodes: int  # of any tree
    levels: int  # of guesses that are to take time of their own; 0 where the chains are all that is wanted
    chains: Chains  # guesses from the host: what followed the last tokens before
    noise: Noise | None  # of the coming draws, `levels` of each request; None where all are greedy
    least: Tensor | None = None  # [num_requests] float32: log-probability below which a node is not worth it


class TreeGrower(ABC):
    """Bound heads that grow trees of their guesses."""

    @abstractmethod
    def grow(self, hidden: Tensor, rows: GrowRows) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, parents and numbers of nodes, as `trees.select.grow_trees` has them.

        hidden: [num_requests, hidden], what heads start from.
        """


@dataclass(frozen=True)
class NodeRows:
    """Where the nodes of a pass's trees lie among its rows; every field [num_nodes_total]."""

    rows: Tensor  # int64, of each node
    above: Tensor  # int64, of the node above it; a root's and padding's may be any number
    is_draft: Tensor  # bool: whether the node is no root


class CachedPrefix(ABC):
    """A prefix layer of heads over the paged cache. The entry of the token at position p lies in that token's
    slot: compaction, sharing and preemption treat it as they treat the base's own KV."""

    @abstractmethod
    def start(self, roots: Tensor, positions: Tensor, hidden: Tensor, attention: Attention) -> Tensor:
        """What heads start from at each root, [num_requests, hidden], in any float format.

        roots, positions: [num_requests] int64; hidden: [num_requests, hidden], the base's row that each root
        was drawn from; attention: over the roots, by the backend that made this.
        """

    @abstractmethod
    def write(
        self,
        step: PassInput,
        hidden: Tensor,
        first_rows: Tensor,
        before: Tensor,
        nodes: NodeRows | None,
        is_padded: bool,
    ) -> None:
        """Write the entries of all tokens of a pass, drafts included.

        hidden: [num_tokens, hidden], the base's rows; first_rows: [num_requests] int64, each request's first
        row; before: [num_requests, hidden], the base's rows before those; nodes: None where nobody has
        drafts; is_padded: see `Backend.write`.
        """
