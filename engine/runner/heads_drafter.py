"""Drafts with a head set that is bound to its base model: every request gets a tree of its own.

Heads with a prefix layer keep its keys and values in the base's cache, as one more layer of it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.backends.kv_cache import KVCache
from engine.backends.native.attention import NativeAttention
from engine.backends.native.hydra import NativeHydra, NativePrefix, can_take_heads, can_take_prefix
from engine.backends.native.precision import draft_linear
from engine.batch import ScheduledRequest
from engine.errors import ConfigError
from engine.model.config import DecoderConfig
from engine.model.layers import Attention
from engine.runner.drafter import Drafter, Proposal, RootRows, propose_chains
from engine.runner.step_input import CommitRows, StepInput
from heads.base import DraftHeads, plain_linear
from heads.checkpoint import HeadSet
from heads.hydra import HydraHeads
from heads.prefix import PrefixLayer
from trees.select import Guess, grow_trees, most_drafts
from trees.verify import DraftTrees


class HeadsDrafter(Drafter):
    """heads: bound to the model whose projection onto the vocabulary is lm_head_weight. The n-gram guesses of
    a request join its tree beside those of the heads."""

    takes_chains = True
    trims = True

    def __init__(self, heads: DraftHeads, lm_head_weight: Tensor) -> None:
        if heads.embedding is None:
            raise ConfigError("heads", "the heads are not bound to a model")
        self._heads = heads
        self._embedding = heads.embedding
        self._native: NativeHydra | None = None
        if isinstance(heads, HydraHeads) and can_take_heads(heads, lm_head_weight):
            self._native = NativeHydra(heads, lm_head_weight, heads.embedding)
        self._prefix: _CachedPrefix | _NativeCachedPrefix | None = None
        self.num_levels = heads.num_heads
        if heads.prefix_layer is not None:
            self.num_cache_layers, self.root_heads = 1, heads.prefix_layer.num_heads

    @classmethod
    def of(cls, heads: HeadSet, embedding: Tensor, lm_head_weight: Tensor) -> HeadsDrafter:
        """Drafts with a head set on the base whose weights, both [vocab, hidden], these are.

        Raises HeadsError where they are another model's.
        """
        module = heads.module
        # What our kernels take whole needs no fast products one by one.
        whole = isinstance(module, HydraHeads) and can_take_heads(module, lm_head_weight)
        whole = whole and module.prefix_layer is not None and can_take_prefix(module.prefix_layer, embedding)
        bound = heads.bind(embedding, lm_head_weight, plain_linear if whole else draft_linear)
        return cls(bound, lm_head_weight)

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
        if cache.has_kernels and can_take_prefix(layer, self._embedding):
            native = NativePrefix(layer, self._embedding, config.max_positions)
            self._prefix = _NativeCachedPrefix(native, layer, cache)
        else:
            self._prefix = _CachedPrefix(layer, self._embedding, cache)

    def limit(self, scheduled: ScheduledRequest) -> int:
        return most_drafts(scheduled.num_drafts, self._heads.num_heads, self._heads.num_tokens)

    def grow(self, rows: RootRows) -> Proposal:
        if not rows.levels:
            return propose_chains(rows)
        hidden, depth = rows.hidden, max(rows.levels, rows.chains.length)
        if self._prefix is not None and rows.attention is not None:
            hidden = self._prefix.start(rows, rows.attention)
        if self._native is not None:
            tokens, parents, num_nodes = self._native.grow(hidden, rows)
            return Proposal(tokens, parents, depth, num_nodes)
        guess = self._guess_from(hidden.to(rows.hidden.dtype), rows)
        tokens, parents, num_nodes = grow_trees(
            guess, rows.roots, rows.num_nodes, rows.max_nodes, rows.levels, rows.chains, rows.least
        )
        return Proposal(tokens, parents, depth, None if rows.least is None else num_nodes)

    def _guess_from(self, hidden: Tensor, rows: RootRows) -> Guess:
        """The heads as `grow_trees` asks them. hidden: [num_requests, hidden], what they start from."""
        state = self._heads.begin(hidden, rows.roots, rows.levels)

        def guess(level: int, tokens: Tensor, origins: Tensor, num_guesses: int) -> tuple[Tensor, Tensor]:
            nonlocal state
            added = None
            if rows.noise is not None:
                added = rows.noise.of_level(level, self._heads.num_tokens, self._heads.token_map)
            guesses, log_probs, state = self._heads.guess(level, state, tokens, origins, num_guesses, added)
            return guesses, log_probs

        return guess

    def observe(
        self, step: StepInput, trees: DraftTrees, hidden: Tensor, rows_before: Callable[[], Tensor]
    ) -> None:
        if self._prefix is not None:
            self._prefix.write(step, trees, hidden, rows_before())


def _rows_above(commits: CommitRows, trees: DraftTrees) -> tuple[Tensor, Tensor]:
    """For each node of a pass the flat row of the node above it (padding: anything), [num_nodes_total] int64,
    and whether it is a draft, [num_nodes_total] bool."""
    roots = commits.rows[commits.first_row].unsqueeze(1)
    above = (roots + trees.parents).reshape(-1)[commits.places]
    return above, commits.places % commits.max_nodes > 0


class _CachedPrefix:
    """A prefix layer over the paged cache. The entry of the token at position p lies in that token's slot:
    compaction, sharing and preemption treat it as they treat the base's own KV. embedding: the base's."""

    def __init__(self, layer: PrefixLayer, embedding: Tensor, cache: KVCache) -> None:
        self._layer, self._embedding, self._cache = layer, embedding, cache
        self._number = cache.num_layers - 1

    def start(self, rows: RootRows, attention: Attention) -> Tensor:
        """What heads start from at each root, [num_requests, hidden]."""
        hidden, roots, positions = rows.hidden, rows.roots, rows.positions
        entries = self._layer.entries(hidden, F.embedding(roots, self._embedding))
        q = self._layer.queries(entries, positions)
        read = attention(self._number, q, *self._layer.keys_values(entries, positions))
        return self._layer.finish(hidden, read)

    def write(self, step: StepInput, trees: DraftTrees, hidden: Tensor, before: Tensor) -> None:
        """Entries of all tokens of a pass, drafts included. hidden: [num_tokens, hidden], the base's rows;
        before: [num_requests, hidden], those before each request's first."""
        rows_before = hidden.roll(1, dims=0)
        rows_before[step.first_rows] = before
        commits = step.commits
        if commits.max_nodes > 1:
            above, is_draft = _rows_above(commits, trees)
            rows = hidden[above.clamp_(max=len(hidden) - 1)]
            rows_before[commits.rows] = torch.where(is_draft.unsqueeze(1), rows, rows_before[commits.rows])
        entries = self._layer.entries(rows_before, F.embedding(step.token_ids, self._embedding))
        write = self._cache.write_padded if step.is_padded else self._cache.write
        write(self._number, step.slots, *self._layer.keys_values(entries, step.positions))


class _NativeCachedPrefix:
    """The same by our own kernels."""

    def __init__(self, native: NativePrefix, layer: PrefixLayer, cache: KVCache) -> None:
        self._native, self._layer, self._cache = native, layer, cache
        self._number = cache.num_layers - 1

    def start(self, rows: RootRows, attention: Attention) -> Tensor:
        if not isinstance(attention, NativeAttention):
            raise TypeError("our kernels read the cache by their own attention")
        return self._native.start(attention, self._number, rows.roots, rows.positions, rows.hidden)

    def write(self, step: StepInput, trees: DraftTrees, hidden: Tensor, before: Tensor) -> None:
        firsts = (step.starts[:-1], before, np.arange(len(before)))
        drafts = []
        if len(step.commits.drafting):
            above, is_draft = _rows_above(step.commits, trees)
            drafts.append((step.commits.rows[is_draft].numpy(), hidden, above[is_draft].numpy()))
        attention = NativeAttention(step, self._cache, self._layer.num_heads, self._layer.num_kv_heads)
        self._native.write(attention, self._number, step.token_ids, step.positions, hidden, [firsts, *drafts])
