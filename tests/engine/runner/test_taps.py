"""Drafters that read rows of inner layers, and attend over KV of their own at every level."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.backends.kv_cache import KVCache
from engine.batch import ScheduledRequest
from engine.errors import ConfigError
from engine.model.config import DecoderConfig
from engine.model.layers import Attention
from engine.runner.bucket import Bucket
from engine.runner.drafter import Drafter, Proposal, RootRows
from engine.runner.layout import build_rows
from engine.runner.step_input import StepInput
from tests.engine.families import chain
from tests.engine.graphs import add_graphs
from tests.engine.helpers import params
from tests.engine.tiny import CONFIG, VOCAB, Arrival, TinyEngine, tiny_backend, tiny_decoder
from tests.fakes import DenseCausalAttention
from trees.verify import DraftTrees

LENGTH = 40
PROMPTS = (
    [5, 9, 17, 33, 8] * 6,
    [(7 * p + p * p) % VOCAB for p in range(12)],
    [5, 9, 17, 33, 8] * 6 + [3, 4],
)


class LastLayerDrafter(Drafter):
    """Runs the base itself: its first layer on the base's own KV, its last layer on KV that it has made of
    tapped rows. So its guesses are right exactly where these rows, its KV and its attention are.

    Trees have two nodes at each level: the likeliest token, which goes on, then the second likeliest.
    """

    taps = (0,)
    num_cache_layers = 1
    capturable = False  # it looks at requests

    def __init__(self) -> None:
        self.decoder = tiny_decoder()
        self.hidden = self.decoder.config.hidden_size
        self.roots_checked = 0

    def attach(self, config: DecoderConfig, cache: KVCache) -> None:
        self.cache = cache

    def limit(self, scheduled: ScheduledRequest) -> int:
        return scheduled.num_drafts

    def observe(
        self, step: StepInput, trees: DraftTrees, hidden: Tensor, rows_before: Callable[[], Tensor]
    ) -> None:
        assert hidden.shape[1] == rows_before().shape[1] == 2 * self.hidden
        attention = tiny_backend().attention(step, self.cache, CONFIG.num_heads)
        self.last_layer(hidden[:, self.hidden :], step.positions, attention)

    def grow(self, rows: RootRows) -> Proposal:
        bases = rows.positions.tolist()
        tokens, parents = [rows.roots], [0]
        current, path = rows.roots, [0]
        for level in range(rows.max_nodes // 2):
            # Node path[-1] lies behind all committed positions, and sees those, its ancestors and itself.
            places = [base + path[-1] for base in bases]
            row = build_rows(
                rows.requests, places, [place + 1 for place in places], self.cache.block_size, current.device
            )
            row = replace(
                row,
                positions=rows.positions + level,
                prefix_len=rows.positions.numpy(),
                ancestors=torch.full_like(rows.roots, sum(1 << node for node in path)),
            )
            attention = tiny_backend().attention(row, self.cache, CONFIG.num_heads)
            [layer, _], [table] = self.decoder.layers, self.decoder.ropes
            x = F.embedding(current, self.decoder.embedding)
            x = layer(x, table(row.positions, x.dtype), attention)
            logits = self.decoder.logits(self.decoder.norm(self.last_layer(x, row.positions, attention)))
            best = tiny_backend().argmax(logits)
            second = tiny_backend().argmax(logits.scatter(1, best.unsqueeze(1), -torch.inf))
            tokens += [best, second]
            parents += [path[-1]] * 2
            path.append(len(parents) - 2)
            current = best
        self.check_roots(rows)
        columns = torch.stack(tokens, dim=1)[:, : rows.max_nodes]
        return Proposal(columns, torch.tensor(parents)[: rows.max_nodes].expand_as(columns), len(path) - 1)

    def last_layer(self, x: Tensor, positions: Tensor, attention: Attention) -> Tensor:
        """Its layer lies after the base's in the cache."""

        def own(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention(self.cache.num_layers - 1, q, k, v)

        [_, layer], [table] = self.decoder.layers, self.decoder.ropes
        row: Tensor = layer(x, table(positions, x.dtype), own)
        return row

    def check_roots(self, rows: RootRows) -> None:
        """The rows that roots were drawn from are those of the tokens before them."""
        for request, row in zip(rows.requests, rows.hidden, strict=True):
            known = torch.tensor(request.token_ids[:-1])
            attention = DenseCausalAttention(CONFIG)
            expected = self.decoder(known, torch.arange(len(known)), attention, self.taps)[-1]
            torch.testing.assert_close(row, expected, rtol=0, atol=1e-4)
            self.roots_checked += 1


@pytest.mark.parametrize("sizes", [{}, {"block_size": 3, "num_blocks": 300, "budget": 14}], ids=str)
@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
def test_a_drafter_may_tap_layers_and_attend_at_every_level(sizes: dict[str, int], graphs: bool) -> None:
    requests = [
        Arrival(str(i), prompt, params(LENGTH, ignore_eos=True), step=2 * i)
        for i, prompt in enumerate(PROMPTS)
    ]
    expected = TinyEngine(**sizes).run(requests)
    drafter = LastLayerDrafter()
    engine = TinyEngine(chain(6), drafter, **sizes)
    if graphs:
        capture = add_graphs(engine.runner, [Bucket.of(1, 8, 8), Bucket.of(4, 30, 8)])
    for name, result in engine.run(requests).items():
        usage = result.outputs[-1].usage
        assert result.tokens == expected[name].tokens
        # Three levels of two: each step accepts three of six, but the last may end before. A small budget
        # cuts trees, which leaves out guesses that come late.
        assert 2 * usage.accepted_tokens >= usage.drafted_tokens - 6
        assert sizes or 2 * usage.accepted_tokens <= usage.drafted_tokens + 6
        assert usage.accepted_tokens >= 20
    assert drafter.roots_checked > 20
    assert not graphs or capture.num_replays > 20


@pytest.mark.parametrize("taps", [(2,), (-1,), (1, 0), (0, 0)])
def test_taps_that_are_no_layers_are_refused(taps: tuple[int, ...]) -> None:
    drafter = LastLayerDrafter()
    drafter.taps = taps
    with pytest.raises(ConfigError, match="layers 0 to 1"):
        TinyEngine(chain(2), drafter)
