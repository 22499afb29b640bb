"""Drafts a chain with a second, smaller decoder of the same vocabulary, token after token.

Its KV lives in a cache of its own under the base's block tables, so that whoever shares a block of the base's
shares the draft model's too. It is computed when the base's is: in `observe` for known tokens, in `grow`
for drafts. A chain never moves in compaction.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from engine.backends.backend import Backend
from engine.backends.kv_cache import KVCache, bytes_per_token
from engine.backends.noise import Noise
from engine.batch import RequestState, ScheduledRequest
from engine.errors import ConfigError
from engine.model.config import DecoderConfig
from engine.model.decoder import Decoder
from engine.model.running import RunningDecoder
from engine.runner.drafter import Drafter, Proposal, RootRows, chain_parents
from engine.runner.layout import build_rows
from engine.runner.per_request import PerRequest
from engine.runner.step_input import StepInput
from engine.runner.transfer import integers
from trees.verify import DraftTrees


@dataclass
class _Progress:
    """`length`: positions of a request whose draft KV was computed, drafts included that may be refused."""

    length: int


class DraftModelDrafter(Drafter):
    """backend: that runs the draft model, whose decoder is as it makes it (`Backend.in_formats`)."""

    capturable = False
    _cache: KVCache  # there once attached

    def __init__(self, decoder: RunningDecoder, backend: Backend) -> None:
        self._decoder, self._backend = decoder, backend
        self.cache_bytes_per_token = bytes_per_token(decoder.config, decoder.embedding.dtype)
        # What it starts with, the prefix cache has given it, the draft model's part included.
        self._progress = PerRequest(lambda request: _Progress(request.num_computed))

    def attach(self, config: DecoderConfig, cache: KVCache) -> None:
        """Raises ConfigError where the vocabularies differ."""
        own = self._decoder.config
        if own.vocab_size != config.vocab_size:
            raise ConfigError(
                "drafter",
                f"the draft model has {own.vocab_size} tokens, but the model has {config.vocab_size}; "
                "choose one of the same family",
            )
        embedding = self._decoder.embedding
        self._cache = KVCache(own, cache.num_blocks, cache.block_size, embedding.dtype, embedding.device)

    def limit(self, scheduled: ScheduledRequest) -> int:
        positions = self._decoder.config.max_positions - len(scheduled.request.token_ids)
        return max(0, min(scheduled.num_drafts, positions))

    def grow(self, rows: RootRows) -> Proposal:
        requests, device = rows.requests, rows.roots.device
        tokens = torch.nn.functional.pad(rows.roots.unsqueeze(1), (0, rows.max_nodes - 1))
        roots_at, budgets = [len(request.token_ids) - 1 for request in requests], rows.num_nodes.tolist()
        # A chain that was accepted whole left its last node, which no draft followed, uncomputed.
        firsts = [min(self._known(request), root) for request, root in zip(requests, roots_at, strict=True)]
        hidden = self._run(requests, firsts, [root + 1 for root in roots_at])
        lengths = [root + 1 - first for root, first in zip(roots_at, firsts, strict=True)]
        ends = integers(list(itertools.accumulate(lengths)), device)
        noise = rows.noise
        tokens[:, 1] = self._guess(hidden[ends - 1], noise, 0)
        for node in range(1, rows.max_nodes - 1):
            going_on = [i for i, budget in enumerate(budgets) if budget > node + 1]
            places = [roots_at[i] + node for i in going_on]
            chosen = integers(going_on, device)
            hidden = self._run(
                [requests[i] for i in going_on], places, [p + 1 for p in places], tokens[chosen, node]
            )
            tokens[chosen, node + 1] = self._guess(hidden, noise and noise.rows(chosen), node)
        for request, root, budget in zip(requests, roots_at, budgets, strict=True):
            self._progress[request].length = root + budget - 1
        return Proposal(tokens, chain_parents(tokens), rows.max_nodes - 1)

    def _guess(self, hidden: Tensor, noise: Noise | None, level: int) -> Tensor:
        """The likeliest tokens, [num_requests] int64. hidden: [num_requests, hidden]; noise: of the same."""
        logits = self._decoder.logits(hidden)
        if noise is not None:
            keys = noise.keys[:, level]
            logits = logits.float() + self._backend.gumbel(keys, noise.temperatures, logits.shape[1])
        return self._backend.argmax(logits)

    def observe(
        self, step: StepInput, trees: DraftTrees, hidden: Tensor, rows_before: Callable[[], Tensor]
    ) -> None:
        """Compute the known tokens of requests that drafted nothing: the prompts' chunks, above all."""
        requests, firsts, ends = [], [], []
        for scheduled in step.scheduled:
            request = scheduled.request
            first, end = self._known(request), request.num_computed + scheduled.num_tokens
            end = min(end, self._decoder.config.max_positions)
            if scheduled.num_drafts or first >= end:
                continue
            requests.append(request)
            firsts.append(first)
            ends.append(end)
        if requests:
            self._run(requests, firsts, ends)
        for request, end in zip(requests, ends, strict=True):  # once nothing can fail any more
            self._progress[request].length = end

    def _known(self, request: RequestState) -> int:
        """The positions whose draft KV is that of the request's tokens."""
        return min(self._progress[request].length, request.num_computed)

    def _run(
        self,
        requests: Sequence[RequestState],
        firsts: Sequence[int],
        ends: Sequence[int],
        token_ids: Tensor | None = None,
    ) -> Tensor:
        """Hidden rows of these positions, [num_tokens, hidden]; token_ids: of drafts, [num_tokens]."""
        rows = build_rows(requests, firsts, ends, self._cache.block_size, self._decoder.embedding.device)
        attention = self._backend.attention(rows, self._cache, self._decoder.config.num_heads)
        token_ids = rows.token_ids if token_ids is None else token_ids
        return self._decoder(token_ids, rows.positions, attention)


def first_layers(decoder: Decoder, num_layers: int) -> Decoder:
    """The decoder without its later layers, as a draft model of itself. It shares the weights.

    Raises ConfigError where there are not so many layers.
    """
    if not 1 <= num_layers <= decoder.config.num_layers:
        raise ConfigError(
            "num_layers", f"must be 1 to {decoder.config.num_layers}, the model's own, not {num_layers}"
        )
    with torch.device("meta"):
        short = Decoder(replace(decoder.config, layers=decoder.config.layers[:num_layers]))
    short.embedding, short.norm, short.lm_head = decoder.embedding, decoder.norm, decoder.lm_head
    short.layers = nn.ModuleList(list(decoder.layers)[:num_layers])
    short.ropes = decoder.ropes
    return short.eval()
