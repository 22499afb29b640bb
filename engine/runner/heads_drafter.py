"""Drafts with a head set that is bound to its base model: every request gets a tree of its own.

Heads with a prefix layer keep its keys and values in the base's cache, as one more layer of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from engine.errors import ConfigError
from engine.model.config import DecoderConfig
from engine.runner.attention import paged_attention
from engine.runner.drafter import Drafter, DraftInput, Proposal
from engine.runner.kv_cache import KVCache
from engine.runner.ngram_drafter import propose_chains
from engine.runner.step_input import StepInput, build_rows
from engine.scheduling.batch import ScheduledRequest
from engine.scheduling.ngrams import Chain
from heads.base import DraftHeads
from heads.prefix import PrefixLayer
from trees.select import grow_trees, make_chains, most_drafts
from trees.verify import DraftTrees


class HeadsDrafter(Drafter):
    """heads: bound. The n-gram guesses of a request join its tree beside those of the heads."""

    takes_chains = True

    def __init__(self, heads: DraftHeads) -> None:
        self._heads = heads
        self._prefix: _CachedPrefix | None = None
        self.num_cache_layers = 0 if heads.prefix_layer is None else 1

    def attach(self, config: DecoderConfig, cache: KVCache) -> None:
        """Raises ConfigError where the cache cannot hold the prefix layer's keys."""
        layer = self._heads.prefix_layer
        if layer is not None:
            self._prefix = _CachedPrefix(layer, config, cache)

    def limit(self, scheduled: ScheduledRequest) -> int:
        return most_drafts(scheduled.num_drafts, self._heads.num_heads, self._heads.num_tokens)

    def propose(self, draft: DraftInput) -> Proposal:
        heads, hidden = self._heads, draft.hidden
        if all(map(_is_sure, draft.chains, draft.budgets)):  # then the heads could only agree
            return propose_chains(draft)
        max_depth = min(heads.num_heads, draft.max_nodes - 1)
        if self._prefix is not None:
            hidden = self._prefix.start(draft, self._embedded(draft.roots))
        state = heads.begin(hidden, draft.roots, max_depth)

        def guess(level: int, tokens: Tensor, origins: Tensor, num_guesses: int) -> tuple[Tensor, Tensor]:
            nonlocal state
            guesses, log_probs, state = heads.guess(level, state, tokens, origins, num_guesses)
            return guesses, log_probs

        chains = make_chains(
            [(c.token_ids, c.gains) for c in draft.chains], draft.max_nodes - 1, hidden.device
        )
        tokens, parents = grow_trees(guess, draft.roots, draft.num_nodes, draft.max_nodes, max_depth, chains)
        return Proposal(tokens, parents, max(max_depth, chains.length))

    def observe(
        self, step: StepInput, trees: DraftTrees, hidden: Tensor, rows_before: Callable[[], Tensor]
    ) -> None:
        if self._prefix is not None:
            self._prefix.write(step, trees, hidden, rows_before(), self._embedded(step.token_ids))

    def _embedded(self, token_ids: Tensor) -> Tensor:
        if self._heads.embedding is None:
            raise ConfigError("heads", "the heads are not bound to a model")
        return torch.nn.functional.embedding(token_ids, self._heads.embedding)


def _is_sure(chain: Chain, num_nodes: int) -> bool:
    """Whether no guess beside the chain can be as likely as the chain's own, as many as there is room for:
    what may branch off at a node has at most the probability that the chain loses there."""
    gains = (1.0, *chain.gains[: num_nodes - 1])
    if len(gains) < num_nodes:
        return False
    return all(before - after <= gains[-1] for before, after in itertools.pairwise(gains))


class _CachedPrefix:
    """A prefix layer over the paged cache. The entry of the token at position p lies in that token's slot:
    compaction, sharing and preemption treat it as they treat the base's own KV."""

    def __init__(self, layer: PrefixLayer, config: DecoderConfig, cache: KVCache) -> None:
        own, base = (layer.num_kv_heads, layer.head_dim), (config.num_kv_heads, config.head_dim)
        if own != base:
            raise ConfigError(
                "heads",
                f"the prefix layer has {own[0]} KV heads of size {own[1]}, which do not fit into the cache "
                f"of the model's {base[0]} of size {base[1]}; train heads for this model",
            )
        self._layer, self._cache = layer, cache
        self._number = cache.num_layers - 1

    def start(self, draft: DraftInput, roots: Tensor) -> Tensor:
        """What heads start from at each root, [num_requests, hidden]; roots: their embeddings."""
        bases = [len(request.token_ids) - 1 for request in draft.requests]
        ends = [base + 1 for base in bases]
        rows = build_rows(draft.requests, bases, ends, self._cache.block_size, draft.roots.device)
        attention = paged_attention(rows, self._cache, self._layer.num_heads, self._layer.num_kv_heads)
        entries = self._layer.entries(draft.hidden, roots)
        q = self._layer.queries(entries, rows.positions)
        read = attention(self._number, q, *self._layer.keys_values(entries, rows.positions))
        return self._layer.finish(draft.hidden, read)

    def write(
        self, step: StepInput, trees: DraftTrees, hidden: Tensor, before: Tensor, embedded: Tensor
    ) -> None:
        """Entries of all tokens of a pass, drafts included. embedded: [num_tokens, hidden]."""
        rows_before = hidden.roll(1, dims=0)
        rows_before[torch.from_numpy(step.starts[:-1]).to(hidden.device)] = before
        commits = step.commits
        if commits.drafting:
            roots = commits.rows[commits.first_row].unsqueeze(1)  # flat rows
            above = (roots + trees.parents).reshape(-1)[commits.places]
            drafts = commits.places % commits.max_nodes > 0
            rows_before[commits.rows[drafts]] = hidden[above[drafts]]
        entries = self._layer.entries(rows_before, embedded)
        self._cache.write(self._number, step.slots, *self._layer.keys_values(entries, step.positions))
