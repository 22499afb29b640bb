"""Decoding in buckets, as CUDA graphs do it, gives the answers it gives without: padding changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.batch import BatchLimits
from engine.runner.bucket import Bucket
from engine.runner.capture import default_buckets
from engine.runner.draft_model import DraftModelDrafter, first_layers
from engine.runner.drafter import ChainDrafter, Drafter
from tests.engine.families import chain, families, full
from tests.engine.graphs import add_graphs
from tests.engine.helpers import params
from tests.engine.runner.test_greedy import (
    ALL_PROMPTS,
    KINDS,
    LENGTH,
    arrivals_of,
    check_outputs,
    make_drafter,
)
from tests.engine.runner.test_heads_drafter import Recording, bound, check_starts, drafter_of, hydra, medusa
from tests.engine.tiny import EOS, NO_TREE, Arrival, Result, TinyEngine, tiny_backend, tiny_decoder
from trees.family import TreeFamily

FEW = [
    Bucket.of(1, 1, 13),
    Bucket.of(1, 8, 13),
    Bucket.of(4, 4, 13),
    Bucket.of(4, 26, 13),
    Bucket.of(8, 104, 13),
]


@st.composite
def bucket_lists(draw: st.DrawFn) -> list[Bucket]:
    buckets = []
    for _ in range(draw(st.integers(1, 3))):
        num_requests, max_nodes = draw(st.integers(1, 5)), draw(st.integers(1, 17))
        num_tokens = draw(st.integers(num_requests, num_requests * max_nodes))
        buckets.append(Bucket.of(num_requests, num_tokens, max_nodes))
    return list(set(buckets))


@settings(max_examples=30, deadline=None)
@given(
    family=families(max_drafts=16),
    kind=st.sampled_from(KINDS),
    requests=st.lists(
        st.tuples(st.integers(0, len(ALL_PROMPTS) - 1), st.integers(0, 12), st.integers(1, LENGTH)),
        min_size=1,
        max_size=5,
    ),
    block_size=st.integers(1, 32),
    spare_blocks=st.integers(0, 8),
    drafts=st.integers(0, 16),
    buckets=bucket_lists(),
)
def test_any_buckets_give_the_plain_answers(
    family: TreeFamily,
    kind: str,
    requests: list[tuple[int, int, int]],
    block_size: int,
    spare_blocks: int,
    drafts: int,
    buckets: list[Bucket],
) -> None:
    arrivals = arrivals_of(*map(list, zip(*requests, strict=True)))  # type: ignore[arg-type]
    engine = TinyEngine(
        family,
        make_drafter(kind),
        drafts=drafts,
        num_blocks=5 * -(-20 // block_size) + -(-100 // block_size) + spare_blocks,
        block_size=block_size,
        max_num_seqs=5,
        max_model_len=100,
    )
    add_graphs(engine.runner, buckets)
    check_outputs(engine, arrivals)


def run_both(
    make_engine: Callable[[], TinyEngine], arrivals: list[Arrival], buckets: list[Bucket] = FEW
) -> tuple[dict[str, Result], TinyEngine, int]:
    """Run without graphs and with, which must come to the same in the same steps; the results, the second
    engine, and its number of replays."""
    plain, graphed = make_engine(), make_engine()
    capture = add_graphs(graphed.runner, buckets)
    expected, found = plain.run(arrivals), graphed.run(arrivals)
    for arrival in arrivals:
        pairs = zip(expected[arrival.request_id].outputs, found[arrival.request_id].outputs, strict=True)
        for one, other in pairs:
            assert one.token_ids == other.token_ids
            assert one.finish_reason == other.finish_reason
            assert (one.logprobs is None) == (other.logprobs is None)
    assert plain.num_accepted == graphed.num_accepted
    assert plain.num_preemptions == graphed.num_preemptions
    return found, graphed, capture.num_replays


def engine_with(drafter: Callable[[], Drafter | None], **sizes: Any) -> Callable[[], TinyEngine]:
    return lambda: TinyEngine(full(12), drafter(), **{"block_size": 4, "num_blocks": 100, **sizes})


HEADS = {
    "medusa": lambda: drafter_of(bound(medusa())),
    "hydra": lambda: drafter_of(bound(hydra())),
    "n-grams": ChainDrafter,
    "draft model": lambda: DraftModelDrafter(first_layers(tiny_decoder(), 1), tiny_backend()),
}


@pytest.mark.parametrize("drafter", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("num_blocks", [100, 40], ids=["room", "preempted"])
def test_heads_and_ngrams_guess_the_same(drafter: Callable[[], Drafter], num_blocks: int) -> None:
    arrivals = arrivals_of([7, 6, 8, 5], [0, 1, 2, 3], [LENGTH] * 4)
    sizes = {"num_blocks": num_blocks, "max_model_len": 100}
    _, engine, replays = run_both(engine_with(drafter, **sizes), arrivals)
    assert engine.num_accepted > 0
    assert (engine.num_preemptions > 0) == (num_blocks == 40)
    assert replays > LENGTH


def test_the_cached_prefix_layer_equals_a_dense_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    # Passes by a graph, guesses without: those can be compared.
    monkeypatch.setattr("engine.runner.capture._MOST_GUESSING", 0)
    heads = hydra()
    bound(heads)
    drafter = Recording(heads)
    engine = TinyEngine(full(12), drafter, block_size=4, num_blocks=100, budget=24)
    add_graphs(engine.runner, [Bucket.of(6, 78, 13)])
    engine.run(arrivals_of([7, 3, 6, 4], [0, 1, 1, 2], [LENGTH] * 4))
    check_starts(drafter, heads)


def test_without_drafts() -> None:
    make_engine = lambda: TinyEngine(NO_TREE, None, max_num_seqs=4)  # noqa: E731
    _, _, replays = run_both(
        make_engine, arrivals_of([0, 7, 3], [0, 3, 5], [LENGTH, 5, 9]), [Bucket.of(4, 4, 1)]
    )
    assert replays >= 2 * (LENGTH - 3)


def test_whatever_requests_ask_for_is_drawn_by_a_graph() -> None:
    arrivals = arrivals_of([2, 3, 4], [0, 0, 6], [LENGTH] * 3)
    asks: list[dict[str, Any]] = [
        {"temperature": 0.9, "seed": 5},
        {"logprobs": 3},
        {"frequency_penalty": 0.5},
    ]
    for arrival, more in zip(arrivals, asks, strict=True):
        arrival.sampling = params(LENGTH, ignore_eos=True, **more)
    _, _, replays = run_both(engine_with(lambda: make_drafter("mixed scrambled")), arrivals)
    assert replays > LENGTH
    alone, _, replays = run_both(engine_with(lambda: make_drafter("mixed scrambled")), arrivals[:1])
    # All but the prompt's, two parts each.
    assert replays == 2 * (len(alone[arrivals[0].request_id].outputs) - 1)


def test_logprobs_are_the_same() -> None:
    [arrival] = arrivals_of([4], [0], [LENGTH])
    arrival.sampling = params(LENGTH, ignore_eos=True, logprobs=2)
    make_engine = engine_with(lambda: make_drafter("mixed"))
    plain, graphed = make_engine(), make_engine()
    add_graphs(graphed.runner, FEW)
    [expected], [found] = plain.run([arrival]).values(), graphed.run([arrival]).values()
    for one, other in zip(expected.outputs, found.outputs, strict=True):
        for a, b in zip(one.logprobs or [], other.logprobs or [], strict=True):
            assert a.token_id == b.token_id
            assert a.logprob == pytest.approx(b.logprob, abs=1e-4)


def test_answers_end_at_the_end_token() -> None:
    arrivals = [
        replace(arrival, sampling=params(LENGTH, logit_bias={EOS: 4.0} if i % 2 else {}))
        for i, arrival in enumerate(arrivals_of([2, 3, 4, 5], [0, 1, 4, 9], [LENGTH] * 4))
    ]
    run_both(engine_with(lambda: make_drafter("mixed scrambled")), arrivals)


def test_only_slots_of_the_pass_are_written() -> None:
    engine = TinyEngine(full(12), make_drafter("mixed"), block_size=4, num_blocks=100)
    capture = add_graphs(engine.runner, [Bucket.of(8, 104, 13)])
    for arrival in arrivals_of([2, 3, 4], [0] * 3, [LENGTH] * 3):
        engine.scheduler.add(arrival.request_id, list(arrival.prompt), arrival.sampling)
    cache, replayed = engine.runner.cache, 0
    while engine.scheduler.has_work():
        batch, before = engine.scheduler.schedule(), cache.k.clone()
        slots = torch.zeros(cache.k.shape[2], dtype=torch.bool)
        for s in batch.scheduled:
            first = s.request.num_computed
            for place in range(first, first + s.num_tokens + s.num_drafts):
                slots[s.request.block_table[place // 4] * 4 + place % 4] = True
        outputs = engine.runner.execute(batch)
        changed = (cache.k != before).any(dim=3).any(dim=1).any(dim=0)
        assert not (changed & ~slots).any()
        engine.scheduler.update(batch, outputs)
        replayed = capture.num_replays
    assert replayed > LENGTH // 2


def test_what_no_bucket_holds_runs_without() -> None:
    engine = TinyEngine(chain(6), make_drafter("mixed"))
    # Two trees of seven nodes: too many tokens, too few nodes in each, too many requests.
    capture = add_graphs(engine.runner, [Bucket.of(2, 13, 13), Bucket.of(4, 24, 6), Bucket.of(1, 13, 13)])
    for arrival in arrivals_of([2, 3], [0, 0], [LENGTH, LENGTH]):
        engine.scheduler.add(arrival.request_id, list(arrival.prompt), arrival.sampling)
    engine.step()  # the prompts
    engine.step()
    assert capture.num_replays == 0
    add_graphs(engine.runner, [Bucket.of(2, 14, 13)])
    assert engine.runner._graphs.find(engine.scheduler.schedule()) is not None


def test_the_smallest_bucket_is_taken() -> None:
    engine = TinyEngine(chain(6), make_drafter("mixed"))
    add_graphs(engine.runner, [Bucket.of(8, 64, 7), Bucket.of(1, 7, 7), Bucket.of(1, 1, 7)])
    [arrival] = arrivals_of([2], [0], [LENGTH])
    engine.scheduler.add(arrival.request_id, list(arrival.prompt), arrival.sampling)
    engine.step()
    graph = engine.runner._graphs.find(engine.scheduler.schedule())
    assert graph is not None
    assert graph.bucket == Bucket(7, 1, 7)


@given(
    requests=st.integers(1, 300),
    drafts=st.integers(0, 63),
    spare=st.integers(0, 4000),
    max_positions=st.integers(1, 4096),
)
def test_default_buckets_hold_all_passes_that_they_promise(
    requests: int, drafts: int, spare: int, max_positions: int
) -> None:
    limits = BatchLimits(requests, requests + spare, 4096, drafts)
    buckets = default_buckets(limits, max_positions)
    assert len(buckets) == len(set(buckets)) <= 60
    nodes = min(drafts + 1, max_positions)
    for count in {1, min(2, requests), requests // 2 or 1, requests}:
        for tree in {1, 2, nodes}:
            tokens = count * tree
            # Padding at most doubles the requests, then the tokens.
            if tree <= nodes and 4 * tokens <= min(512, limits.max_num_batched_tokens):
                assert any(
                    b.num_requests >= count and tokens <= b.num_tokens <= 4 * tokens and b.max_nodes >= tree
                    for b in buckets
                )


def test_another_cache_drops_the_graphs() -> None:
    engine = TinyEngine(full(12), make_drafter("mixed"), block_size=4, num_blocks=100)
    capture = add_graphs(engine.runner, FEW)
    engine.runner.resize_cache(100)
    check_outputs(engine, arrivals_of([2, 3], [0, 3], [6, 9]))
    assert capture.num_replays == 0
