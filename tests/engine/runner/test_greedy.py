"""Greedy output and the KV cache are those of plain causal decoding, whatever is drafted and however the
work is cut."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.backends.kv_cache import KVCache
from engine.runner.drafter import Drafter, Proposal, RootRows
from tests.engine.drafters import RandomDrafter, ScriptedDrafter
from tests.engine.families import chain, families, full
from tests.engine.helpers import params
from tests.engine.tiny import (
    CONFIG,
    CPU,
    NO_TREE,
    VOCAB,
    Arrival,
    TinyEngine,
    greedy,
    plain_pass,
)
from trees.family import TreeFamily

LENGTH = 32
PROMPTS = tuple(
    tuple((11 * i + 3 * p) % VOCAB for p in range(n)) for i, n in enumerate((1, 2, 5, 16, 17, 31, 40, 60))
)
SHARED = tuple((*PROMPTS[6], *tail) for tail in ((1, 2, 3), (1, 2, 4, 5), ()))  # one beginning, three ends
ALL_PROMPTS = (*PROMPTS, *SHARED)


def script(request_id: str) -> tuple[int, ...]:
    """All tokens of the request whose id starts with its prompt's number."""
    prompt = ALL_PROMPTS[int(request_id.split()[0])]
    return prompt + greedy(prompt, LENGTH)


def make_drafter(kind: str, seed: int = 0) -> Drafter:
    """`scrambled` trees have another shape for every request and step."""
    name, _, shape = kind.partition(" ")
    scrambled = shape == "scrambled"
    if name == "random":
        return RandomDrafter(seed, scrambled=scrambled)
    hit_rate = {"oracle": 1.0, "mixed": 0.6, "wrong": 0.0}[name]
    return ScriptedDrafter(script, hit_rate, seed, scrambled=scrambled)


KINDS = ("oracle", "mixed", "random", "wrong", "oracle scrambled", "mixed scrambled")


def check_outputs(engine: TinyEngine, arrivals: list[Arrival]) -> None:
    results = engine.run(arrivals)
    for arrival in arrivals:
        expected = greedy(tuple(arrival.prompt), LENGTH)[: arrival.sampling.max_tokens]
        assert tuple(results[arrival.request_id].tokens) == expected
    assert engine.scheduler.pool.num_held == 0


def arrivals_of(numbers: list[int], steps: list[int], lengths: list[int]) -> list[Arrival]:
    return [
        Arrival(f"{number} {i}", ALL_PROMPTS[number], params(length, ignore_eos=True), step)
        for i, (number, step, length) in enumerate(zip(numbers, steps, lengths, strict=True))
    ]


@settings(max_examples=40, deadline=None)
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
    max_num_seqs=st.integers(1, 5),
    spare_budget=st.integers(0, 40),
    drafts=st.integers(0, 16),
)
def test_output_equals_plain_decoding(
    family: TreeFamily,
    kind: str,
    requests: list[tuple[int, int, int]],
    block_size: int,
    spare_blocks: int,
    max_num_seqs: int,
    spare_budget: int,
    drafts: int,
) -> None:
    arrivals = arrivals_of(*map(list, zip(*requests, strict=True)))  # type: ignore[arg-type]
    engine = TinyEngine(
        family,
        make_drafter(kind),
        drafts=drafts,
        num_blocks=-(-100 // block_size) + spare_blocks,
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        budget=max_num_seqs + spare_budget,
        max_model_len=100,
    )
    check_outputs(engine, arrivals)


@pytest.mark.parametrize("kind", KINDS)
def test_full_batch_with_the_largest_tree(kind: str) -> None:
    engine = TinyEngine(full(), make_drafter(kind), num_blocks=128, budget=600)
    check_outputs(engine, arrivals_of(list(range(8)), [0] * 8, [LENGTH] * 8))
    if kind.startswith("oracle"):
        assert engine.num_accepted > 4 * LENGTH
    if kind == "wrong":
        assert engine.num_accepted == 0


@pytest.mark.parametrize("kind", ["oracle", "mixed", "random", "mixed scrambled"])
def test_preemption_changes_nothing(kind: str) -> None:
    # Four requests of up to 92 tokens in room for little more than one.
    engine = TinyEngine(full(12), make_drafter(kind), num_blocks=28, block_size=4, max_model_len=100)
    check_outputs(engine, arrivals_of([7, 6, 8, 5], [0, 1, 2, 3], [LENGTH] * 4))
    assert engine.num_preemptions > 0


@settings(max_examples=15, deadline=None)
@given(
    family=families(max_drafts=16),
    kind=st.sampled_from(["oracle", "mixed", "random", "oracle scrambled", "mixed scrambled"]),
    block_size=st.integers(1, 20),
    seed=st.integers(0, 100),
)
def test_cache_after_compaction_equals_a_fresh_pass(
    family: TreeFamily, kind: str, block_size: int, seed: int
) -> None:
    numbers = [1, 3, 6, 8]
    engine = TinyEngine(
        family, make_drafter(kind, seed), block_size=block_size, num_blocks=400 // block_size + 1, budget=40
    )
    compared = 0

    def compare() -> None:
        nonlocal compared
        for request in engine.scheduler._running:
            length = request.num_computed
            if not length:
                continue
            k, v = engine.cached(request.block_table, length)
            fresh = plain_pass(request.token_ids[:length])
            torch.testing.assert_close(k, fresh.k, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(v, fresh.v, atol=1e-5, rtol=1e-5)
            compared += 1

    engine.run(arrivals_of(numbers, [0, 1, 2, 3], [LENGTH] * 4), compare)
    assert compared >= 8


class Inspector(ScriptedDrafter):
    """Right most of the time, and checks that it sees the rows the roots were drawn from."""

    inspected = 0

    def grow(self, rows: RootRows) -> Proposal:
        for row, request in zip(rows.hidden, rows.requests, strict=True):
            expected = plain_pass(request.token_ids[:-1]).hidden[-1]
            torch.testing.assert_close(row, expected, atol=2e-5, rtol=1e-5)
            self.inspected += 1
        return super().grow(rows)


def test_drafter_sees_the_row_each_root_was_drawn_from() -> None:
    drafter = Inspector(script, 0.7)
    engine = TinyEngine(full(12), drafter, num_blocks=28, block_size=4, max_model_len=100)
    check_outputs(engine, arrivals_of([7, 6, 8, 5], [0, 1, 2, 3], [LENGTH] * 4))
    assert engine.num_preemptions > 0
    assert drafter.inspected > 20


def test_moved_slots_are_all_read_before_any_is_written() -> None:
    cache = KVCache(CONFIG, 2, 4, torch.float32, CPU)
    cache.k.copy_(torch.arange(8.0).view(1, 1, 8, 1).expand_as(cache.k))
    cache.v.copy_(-cache.k)
    cache.move(torch.tensor([[5, 1, 2, 6]]), torch.tensor([[1, 2, 5, 6]]))
    assert cache.k[:, 0, :, 0].tolist() == [[0, 5, 1, 3, 4, 2, 6, 7]] * CONFIG.num_layers
    assert torch.equal(cache.v, -cache.k)


def test_nodes_that_lie_scattered_are_moved_at_once() -> None:
    # Oracle paths through the last children: destinations are other moves' sources.
    family = TreeFamily(((0,), (1,), (1, 0), (1, 1), (1, 1, 0), (1, 1, 1)), (0.5,) * 6)
    for seed in range(10):
        engine = TinyEngine(family, make_drafter("oracle", seed), block_size=3, num_blocks=100)
        check_outputs(engine, arrivals_of([2], [0], [LENGTH]))
        assert engine.num_accepted > 0


def test_request_without_speculation_beside_one_with() -> None:
    engine = TinyEngine(chain(6), make_drafter("oracle"))
    arrivals = arrivals_of([2, 3], [0, 0], [LENGTH, LENGTH])
    arrivals[0].sampling = params(LENGTH, ignore_eos=True, speculation={"enabled": False})
    results = engine.run(arrivals)
    off, on = (results[a.request_id] for a in arrivals)
    assert off.outputs[-1].usage.drafted_tokens == 0
    assert len(off.outputs) == LENGTH
    assert len(on.outputs) < LENGTH / 3
    for arrival, result in zip(arrivals, (off, on), strict=True):
        assert tuple(result.tokens) == greedy(tuple(arrival.prompt), LENGTH)


def test_oracle_commits_a_whole_chain_each_step() -> None:
    engine = TinyEngine(chain(4), make_drafter("oracle"))
    [arrival] = arrivals_of([4], [0], [21])
    [result] = engine.run([arrival]).values()
    assert [len(output.token_ids) for output in result.outputs] == [1, 5, 5, 5, 5]


def test_no_family_at_all() -> None:
    check_outputs(TinyEngine(NO_TREE, None), arrivals_of([0, 7], [0, 3], [LENGTH, 5]))


def test_token_zero_is_no_padding() -> None:
    # A model that answers with token 0, and a drafter that never guesses it, beside one whose tree is larger.
    engine = TinyEngine(chain(5), make_drafter("wrong"))
    arrivals = arrivals_of([2, 3], [0, 0], [10, 10])
    for arrival in arrivals:
        arrival.sampling = params(10, ignore_eos=True, logit_bias={0: 1000.0})
    arrivals[0].sampling = params(
        10, ignore_eos=True, logit_bias={0: 1000.0}, speculation={"max_draft_tokens": 2}
    )
    results = engine.run(arrivals)
    assert [result.tokens for result in results.values()] == [[0] * 10, [0] * 10]
