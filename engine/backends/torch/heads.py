"""Draft heads by torch's operators: trees of their guesses, and a prefix layer over the paged cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.backends.backend import Backend
from engine.backends.growing import CachedPrefix, GrowRows, NodeRows, TreeGrower
from engine.backends.kv_cache import KVCache
from engine.backends.rows import PassInput
from engine.model.layers import Attention
from heads.base import DraftHeads
from heads.prefix import PrefixLayer
from trees.select import Guess, grow_trees


class TorchGrower(TreeGrower):
    """gumbel: see `Backend.gumbel`."""

    def __init__(
        self, heads: DraftHeads, gumbel: Callable[[Tensor, Tensor, int, Tensor | None], Tensor]
    ) -> None:
        assert heads.embedding is not None
        self._heads, self._gumbel, self._dtype = heads, gumbel, heads.embedding.dtype

    def grow(self, hidden: Tensor, rows: GrowRows) -> tuple[Tensor, Tensor, Tensor]:
        guess = self._guess_from(hidden.to(self._dtype), rows)
        return grow_trees(
            guess, rows.roots, rows.num_nodes, rows.max_nodes, rows.levels, rows.chains, rows.least
        )

    def _guess_from(self, hidden: Tensor, rows: GrowRows) -> Guess:
        """The heads as `grow_trees` asks them. hidden: [num_requests, hidden], what they start from."""
        heads = self._heads
        state = heads.begin(hidden, rows.roots, rows.levels)

        def guess(level: int, tokens: Tensor, origins: Tensor, num_guesses: int) -> tuple[Tensor, Tensor]:
            nonlocal state
            added = None
            if (noise := rows.noise) is not None:
                keys = noise.keys[:, level]
                added = self._gumbel(keys, noise.temperatures, heads.num_tokens, heads.token_map)
            guesses, log_probs, state = heads.guess(level, state, tokens, origins, num_guesses, added)
            return guesses, log_probs

        return guess


class TorchPrefix(CachedPrefix):
    """embedding: [vocab, hidden], the base's."""

    def __init__(self, backend: Backend, layer: PrefixLayer, embedding: Tensor, cache: KVCache) -> None:
        self._backend, self._layer, self._embedding, self._cache = backend, layer, embedding, cache
        self._number = cache.num_layers - 1

    def start(self, roots: Tensor, positions: Tensor, hidden: Tensor, attention: Attention) -> Tensor:
        entries = self._layer.entries(hidden, F.embedding(roots, self._embedding))
        q = self._layer.queries(entries, positions)
        read = attention(self._number, q, *self._layer.keys_values(entries, positions))
        return self._layer.finish(hidden, read)

    def write(
        self,
        step: PassInput,
        hidden: Tensor,
        first_rows: Tensor,
        before: Tensor,
        nodes: NodeRows | None,
        is_padded: bool,
    ) -> None:
        rows_before = hidden.roll(1, dims=0)
        rows_before[first_rows] = before
        if nodes is not None:
            above = hidden[nodes.above.clamp(max=len(hidden) - 1)]
            rows_before[nodes.rows] = torch.where(nodes.is_draft.unsqueeze(1), above, rows_before[nodes.rows])
        entries = self._layer.entries(rows_before, F.embedding(step.token_ids, self._embedding))
        k, v = self._layer.keys_values(entries, step.positions)
        self._backend.write(self._cache, self._number, step.slots, k, v, is_padded)
