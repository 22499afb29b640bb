"""Drafts with a head set that is bound to its base model: every request gets a tree of its own.

Heads with a prefix layer keep its keys and values in the base's cache, as one more layer of it.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from engine.backends.backend import Backend
from engine.backends.growing import CachedPrefix, NodeRows
from engine.backends.kv_cache import KVCache
from engine.batch import ScheduledRequest
from engine.errors import ConfigError
from engine.model.config import DecoderConfig
from engine.runner.drafter import Drafter, Proposal, RootRows, propose_chains
from engine.runner.step_input import CommitRows, StepInput
from heads.base import DraftHeads
from heads.checkpoint import HeadSet
from trees.select import most_drafts
from trees.verify import DraftTrees


class HeadsDrafter(Drafter):
    """heads: bound to the model whose projection onto the vocabulary is lm_head_weight; backend: that runs
    the model. The n-gram guesses of a request join its tree beside those of the heads."""

    takes_chains = True
    trims = True

    def __init__(self, heads: DraftHeads, lm_head_weight: Tensor, backend: Backend) -> None:
        if heads.embedding is None:
            raise ConfigError("heads", "the heads are not bound to a model")
        self._heads, self._backend = heads, backend
        self._embedding = heads.embedding
        self._grower = backend.tree_grower(heads, lm_head_weight)
        self._prefix: CachedPrefix | None = None
        self.num_levels = heads.num_heads
        if heads.prefix_layer is not None:
            self.num_cache_layers, self.root_heads = 1, heads.prefix_layer.num_heads

    @classmethod
    def of(cls, heads: HeadSet, embedding: Tensor, lm_head_weight: Tensor, backend: Backend) -> HeadsDrafter:
        """Drafts with a head set on the base whose weights, both [vocab, hidden], these are.

        Raises HeadsError where they are another model's.
        """
        products = backend.head_products(heads.module, embedding, lm_head_weight)
        return cls(heads.bind(embedding, lm_head_weight, products), lm_head_weight, backend)

    def attach(self, config: DecoderConfig, cache: KVCache) -> None:
        """Raises ConfigError where the cache cannot hold the prefix layer's keys."""
        layer = self._heads.prefix_layer
        if layer is None:
            return
        own, base = (layer.num_kv_heads, layer.head_dim), (config.num_kv_heads, config.head_dim)
        if own != base:
            raise ConfigError(
                "heads",
                f"the prefix layer has {own[0]} KV heads of size {own[1]}, which do not fit into the cache "
                f"of the model's {base[0]} of size {base[1]}; train heads for this model",
            )
        self._prefix = self._backend.cached_prefix(layer, self._embedding, cache, config.max_positions)

    def limit(self, scheduled: ScheduledRequest) -> int:
        return most_drafts(scheduled.num_drafts, self._heads.num_heads, self._heads.num_tokens)

    def grow(self, rows: RootRows) -> Proposal:
        if not rows.levels:
            return propose_chains(rows)
        hidden = rows.hidden
        if self._prefix is not None and rows.attention is not None:
            hidden = self._prefix.start(rows.roots, rows.positions, hidden, rows.attention)
        tokens, parents, num_nodes = self._grower.grow(hidden, rows)
        depth = max(rows.levels, rows.chains.length)
        return Proposal(tokens, parents, depth, None if rows.least is None else num_nodes)

    def observe(
        self, step: StepInput, trees: DraftTrees, hidden: Tensor, rows_before: Callable[[], Tensor]
    ) -> None:
        if self._prefix is not None:
            nodes = _node_rows(step.commits, trees) if step.commits.max_nodes > 1 else None
            self._prefix.write(step, hidden, step.first_rows, rows_before(), nodes, step.is_padded)


def _node_rows(commits: CommitRows, trees: DraftTrees) -> NodeRows:
    roots = commits.rows[commits.first_nodes].unsqueeze(1)
    above = (roots + trees.parents).reshape(-1)[commits.places]
    return NodeRows(commits.rows, above, commits.places % commits.max_nodes > 0)
