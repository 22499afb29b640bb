"""Drafters that are no heads: what they propose, and that the text stays what it is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from torch import nn

from engine.batch import Allowance, Batch, Chain, RequestState, ScheduledRequest
from engine.errors import ConfigError
from engine.model.decoder import Decoder, RopeTable
from engine.runner.draft_model import DraftModelDrafter, first_layers
from engine.runner.drafter import ChainDrafter, Proposal, RootRows
from engine.runner.proposing import limit_drafts
from tests.engine.families import chain
from tests.engine.helpers import params
from tests.engine.tiny import CONFIG, VOCAB, Arrival, TinyEngine, tiny_backend, tiny_decoder

LENGTH = 40
REPEATING = tuple([5, 9, 17, 33, 8] * 6)  # the tiny model does not go on with it, but its own answers repeat
FRESH = tuple((7 * p + p * p) % VOCAB for p in range(12))


def arrivals(prompts: tuple[tuple[int, ...], ...], **sampling: Any) -> list[Arrival]:
    settings = {"ignore_eos": True, **sampling}
    return [
        Arrival(str(i), prompt, params(LENGTH, **settings), step=2 * i) for i, prompt in enumerate(prompts)
    ]


class CountingNgrams(ChainDrafter):
    """Notes what it was asked for and proposed."""

    def __init__(self) -> None:
        super().__init__()
        self.budgets: list[int] = []

    def grow(self, rows: RootRows) -> Proposal:
        self.budgets += rows.num_nodes.tolist()
        return super().grow(rows)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "seed": 3}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("num_blocks", [64, 26], ids=["room", "preempted"])
def test_ngrams_leave_the_text_as_it_is(sampling: dict[str, Any], num_blocks: int) -> None:
    requests = arrivals((REPEATING, FRESH, REPEATING[:13], FRESH[:3]), **sampling)
    sizes = {"num_blocks": num_blocks, "block_size": 4, "max_model_len": 80}
    expected = TinyEngine(**sizes).run(requests)
    engine = TinyEngine(chain(6), ChainDrafter(), **sizes)
    for name, result in engine.run(requests).items():
        assert result.tokens == expected[name].tokens


def test_only_what_has_a_guess_takes_a_row() -> None:
    # A model that is made to answer with one token repeats itself from the third one on.
    drafter = CountingNgrams()
    engine = TinyEngine(chain(6), drafter)
    sampling = params(20, ignore_eos=True, logit_bias={77: 1000.0})
    [result] = engine.run([Arrival("0", FRESH, sampling)]).values()
    assert result.tokens == [77] * 20
    usage = result.outputs[-1].usage
    assert [len(output.token_ids) for output in result.outputs[:4]] == [1, 1, 1, 7]
    assert usage.drafted_tokens == sum(budget - 1 for budget in drafter.budgets)
    assert usage.accepted_tokens == engine.num_accepted > 12


PROMPTS = (REPEATING, FRESH, (*REPEATING, 3, 4), FRESH[:1])


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "seed": 3}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("sizes", [{}, {"num_blocks": 26, "block_size": 4, "budget": 9}], ids=str)
def test_first_layers_leave_the_text_as_it_is(sampling: dict[str, Any], sizes: dict[str, int]) -> None:
    requests = arrivals(PROMPTS, **sampling)
    expected = TinyEngine(max_model_len=80, **sizes).run(requests)
    drafter = DraftModelDrafter(first_layers(tiny_decoder(), 1), tiny_backend())
    engine = TinyEngine(chain(5), drafter, max_model_len=80, **sizes)
    for name, result in engine.run(requests).items():
        assert result.tokens == expected[name].tokens
    assert bool(sizes) == (engine.num_preemptions > 0)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0}, {"temperature": 0.6}], ids=str)
@pytest.mark.parametrize("sizes", [{}, {"block_size": 3, "num_blocks": 300, "budget": 14}], ids=str)
def test_a_model_that_drafts_for_itself_is_always_right(
    sizes: dict[str, int], sampling: dict[str, Any]
) -> None:
    # Its own KV must be whole for that: prompts in chunks, a shared beginning, chains accepted to the end.
    # And where requests sample, it must know the noise of their draws.
    engine = TinyEngine(chain(5), DraftModelDrafter(tiny_decoder(), tiny_backend()), **sizes)
    results = engine.run(arrivals(PROMPTS, **sampling))
    for result in results.values():
        usage = result.outputs[-1].usage
        assert len(result.tokens) == LENGTH
        # The last step may draft past the answer's end.
        assert usage.drafted_tokens - 5 <= usage.accepted_tokens <= usage.drafted_tokens
        assert usage.accepted_tokens >= 20


def test_a_model_that_drafts_for_itself_is_right_after_steps_without_drafts() -> None:
    # Budgets differ between requests; the second one drafts nothing at all.
    requests = arrivals((FRESH, REPEATING, FRESH[:5]))
    for request, speculation in zip(requests, ({"max_draft_tokens": 2}, {"enabled": False}, {}), strict=True):
        request.sampling = params(LENGTH, ignore_eos=True, speculation=speculation)
    requests.append(
        Arrival("3", REPEATING, params(LENGTH, ignore_eos=True), step=60)
    )  # finds "1" in the cache
    engine = TinyEngine(chain(4), DraftModelDrafter(tiny_decoder(), tiny_backend()))
    results = engine.run(requests)
    for result in results.values():
        usage = result.outputs[-1].usage
        assert usage.drafted_tokens - 4 <= usage.accepted_tokens <= usage.drafted_tokens
    assert results["1"].outputs[-1].usage.drafted_tokens == 0
    assert results["3"].outputs[-1].usage.cached_tokens > 0


def test_a_draft_model_with_a_shorter_context_stops_where_it_ends() -> None:
    short = first_layers(tiny_decoder(), 2)
    short.config = replace(CONFIG, max_positions=30)
    short.ropes = nn.ModuleList([RopeTable(CONFIG.ropes[0], CONFIG.head_dim, 30)])
    [request] = arrivals((FRESH,))
    engine = TinyEngine(chain(4), DraftModelDrafter(short, tiny_backend()))
    [result] = engine.run([request]).values()
    [expected] = TinyEngine().run([request]).values()
    assert result.tokens == expected.tokens
    usage = result.outputs[-1].usage
    assert 0 < usage.accepted_tokens == usage.drafted_tokens <= 30 - len(FRESH)


def test_a_draft_model_of_another_vocabulary_is_refused() -> None:
    other = Decoder(replace(CONFIG, vocab_size=64))
    with pytest.raises(ConfigError, match="64 tokens, but the model has 128"):
        TinyEngine(chain(2), DraftModelDrafter(other, tiny_backend()))


@pytest.mark.parametrize("num_layers", [0, 3])
def test_more_layers_than_there_are_is_an_error(num_layers: int) -> None:
    with pytest.raises(ConfigError, match="1 to 2"):
        first_layers(tiny_decoder(), num_layers)


@pytest.mark.parametrize("length", [0, 2, 8])
def test_of_drafts_that_nobody_guesses_nothing_is_expected(length: int) -> None:
    request = RequestState("a", [5, 6], 2, params(20), 0)
    found = Chain([7] * length, [0.5] * length)
    gains = (0.5, 0.25, 0.125, 0.0625)
    scheduled = ScheduledRequest(request, 1, 4, chain=found, allowance=Allowance(4, gains=gains))
    limit_drafts(ChainDrafter(), Batch([scheduled]))
    assert scheduled.num_drafts == min(length, 4)
    assert scheduled.allowance.expected == sum(gains[:length]) and scheduled.asks_heads == (length > 0)
