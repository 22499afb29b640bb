"""Batches that are planned before the last one has ended: confirmed or dropped, they change nothing."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.batch import Batch
from engine.costs import CostModel
from engine.messages import SamplingParams
from engine.scheduling.scheduler import Scheduler
from engine.speculation.adaptive import AdaptiveSpeculation
from engine.speculation.policy import FixedSpeculation
from tests.engine.families import full
from tests.engine.helpers import (
    EOS,
    FakeRunner,
    continuation,
    make_scheduler,
    params,
    random_accept,
)


class Ahead:
    """Steps as the engine makes them where the device works by itself."""

    def __init__(self, scheduler: Scheduler, runner: FakeRunner) -> None:
        self.scheduler, self.runner = scheduler, runner
        self.planned: Batch | None = None
        self.num_confirmed = self.num_dropped = 0
        self.tokens: dict[str, list[int]] = {}

    def step(self) -> Batch:
        planned, self.planned = self.planned, None
        if planned is not None and self.scheduler.confirm(planned):
            batch = planned
            self.num_confirmed += 1
        else:
            batch = self.scheduler.schedule()
            self.num_dropped += planned is not None
        self.scheduler.check_integrity()
        places = [(s.request.num_computed, s.num_drafts) for s in batch.scheduled]
        results = self.runner.execute(batch)
        self.planned = self.scheduler.plan_ahead(batch)
        if self.planned is not None:
            for s, (computed, drafts) in zip(self.planned.scheduled, places, strict=True):
                assert (s.request.num_computed, s.most_gained) == (computed, drafts + 1)
                most = computed + s.most_gained + 1 + s.num_drafts
                assert most <= len(s.request.block_table) * self.scheduler.pool.block_size
                assert most <= self.scheduler.limits.max_model_len + 1
        self.scheduler.check_integrity()
        for output in self.scheduler.update(batch, results):
            self.tokens.setdefault(output.request_id, []).extend(output.token_ids)
        self.scheduler.check_integrity()
        return batch

    def run(self) -> None:
        while self.scheduler.has_work():
            self.step()


def make(accept: Any = lambda drafts: drafts // 2, **settings: Any) -> Ahead:
    scheduler = make_scheduler(**{"num_blocks": 100, "policy": FixedSpeculation(3), **settings})
    return Ahead(scheduler, FakeRunner(scheduler, accept))


def adaptive() -> AdaptiveSpeculation:
    cost = CostModel(passes=((1, 0.01), (64, 0.0105)), first_level=((1, 0.0001),), all_levels=((1, 0.0002),))
    return AdaptiveSpeculation(full(8), cost)


@settings(max_examples=150, deadline=None)
@given(
    requests=st.lists(
        st.tuples(st.integers(1, 30), st.integers(1, 40), st.integers(0, 20), st.integers(0, 8)),
        min_size=1,
        max_size=8,
    ),
    aborted=st.dictionaries(st.integers(0, 7), st.integers(0, 15)),
    seed=st.integers(0, 1000),
    spare_blocks=st.integers(0, 40),
    block_size=st.integers(1, 9),
    max_num_seqs=st.integers(1, 6),
    ngrams=st.booleans(),
    adapts=st.booleans(),
)
def test_every_request_gets_its_own_tokens(
    requests: Sequence[tuple[int, int, int, int]],
    aborted: dict[int, int],
    seed: int,
    spare_blocks: int,
    block_size: int,
    max_num_seqs: int,
    ngrams: bool,
    adapts: bool,
) -> None:
    source = random.Random(seed)
    ahead = make(
        random_accept(seed),
        num_blocks=-(-64 // block_size) + spare_blocks,
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        policy=adaptive() if adapts else FixedSpeculation(4),
        ngrams=ngrams,
    )
    asked: dict[str, tuple[list[int], SamplingParams]] = {}
    for step in range(3000):
        for index, (length, max_tokens, arrives, max_drafts) in enumerate(requests):
            if step == arrives:
                prompt = [source.randrange(3, 9) for _ in range(length)]
                sampling = params(max_tokens, speculation={"max_draft_tokens": max_drafts})
                ahead.scheduler.add(str(index), prompt, sampling)
                asked[str(index)] = (prompt, sampling)
            if aborted.get(index) == step - arrives:
                ahead.scheduler.abort(str(index))
        if ahead.scheduler.has_work():
            ahead.step()
        elif step > 20:
            break
    assert not ahead.scheduler.has_work() and ahead.scheduler.pool.num_held == 0
    for name, (prompt, sampling) in asked.items():
        expected, found = continuation(prompt, sampling), ahead.tokens.get(name, [])
        assert found == expected[: len(found)]
        assert len(found) == len(expected) or int(name) in aborted


def test_all_but_the_first_steps_are_planned_ahead() -> None:
    ahead = make(max_model_len=200)
    for index in range(3):
        ahead.scheduler.add(str(index), [5, 6, index], params(30, ignore_eos=True))
    ahead.run()
    # Not those after the prompts and the first roots, whose drafts start from what these bring.
    assert ahead.num_confirmed > 10 and ahead.num_dropped <= 3


@pytest.mark.parametrize("what", ["abort", "arrival", "end"])
def test_a_plan_is_dropped(what: str) -> None:
    ahead = make(max_model_len=200, accept=lambda drafts: 0)
    for name in "ab":
        ahead.scheduler.add(name, [5, 6, ord(name)], params(20 if name == "a" else 4, ignore_eos=True))
    for _ in range(3 if what == "end" else 2):
        ahead.step()
    if what == "abort":
        ahead.scheduler.abort("b")
    elif what == "arrival":
        ahead.scheduler.add("c", [7, 8], params(5))
    assert ahead.planned is not None or what == "end"
    if what == "end":  # the last token of b is the coming one: nothing is planned on it
        ahead.step()
        assert ahead.planned is None
    batch = ahead.step()
    expected = {"abort": ["a"], "arrival": ["a", "b", "c"], "end": ["a"]}[what]
    assert [s.request.request_id for s in batch.scheduled] == expected
    assert ahead.num_dropped == (what != "end")


def test_a_late_end_drops_the_plan() -> None:
    """An end token is not foreseen."""
    prompt = next([n] for n in range(3, 2000) if EOS_AFTER in continuation([n], params(12))[3:8])
    ahead = make(eos=(EOS_AFTER,), max_model_len=200)
    ahead.scheduler.add("a", prompt, params(30))
    ahead.scheduler.add("b", [3, 4], params(30, ignore_eos=True))
    ahead.run()
    assert ahead.num_dropped == 1
    assert ahead.tokens["a"] == continuation(prompt, params(30), 200, (EOS_AFTER,))


EOS_AFTER = 17  # any token that the fake model says
assert EOS_AFTER != EOS


def test_those_that_wait_for_a_place_do_not_stop_it() -> None:
    ahead = make(max_num_seqs=1, max_model_len=200)
    for name in "ab":
        ahead.scheduler.add(name, [5, 6], params(20, ignore_eos=True))
    ahead.run()
    assert ahead.num_confirmed > 8


def test_memory_that_is_short_stops_it() -> None:
    ahead = make(num_blocks=16, block_size=4, max_num_seqs=4)
    for index in range(4):
        ahead.scheduler.add(str(index), [5, 6, 7, index], params(40, ignore_eos=True))
    ahead.run()
    for index in range(4):
        assert ahead.tokens[str(index)] == continuation([5, 6, 7, index], params(40, ignore_eos=True))


@pytest.mark.parametrize("sure", [False, True])
def test_n_grams_join_planned_trees_unless_they_are_surer_than_heads(
    sure: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.scheduling.grants._SURE", 0.0 if sure else 1.1)
    monkeypatch.setattr("tests.engine.helpers.next_token", lambda known: 3 + len(known) % 4)
    ahead = make(ngrams=True, max_model_len=200)
    ahead.scheduler.add("a", [3, 4, 5, 6, 3, 4, 5, 6], params(30, ignore_eos=True))
    chains = []
    while ahead.scheduler.has_work():
        confirmed = ahead.num_confirmed
        batch = ahead.step()
        if ahead.num_confirmed > confirmed:
            chains += [s.chain.token_ids for s in batch.scheduled]
    assert (ahead.num_confirmed > 5) == (not sure)
    assert all(chains[:-1])  # where one token is left, nobody guesses


def test_plans_that_are_dropped_leave_no_trace() -> None:
    """Two engines make the same steps; one of them plans each of them several times before."""
    states = []
    for num_dropped in (0, 3):
        policy = adaptive()
        scheduler = make_scheduler(num_blocks=200, policy=policy, max_model_len=400, ngrams=True)
        runner = FakeRunner(scheduler, lambda drafts: 0)  # a record that would fade
        for index in range(3):
            scheduler.add(str(index), [5, 6, index], params(200, ignore_eos=True))
        batch = scheduler.schedule()
        for step in range(60):
            results = runner.execute(batch)
            for _ in range(num_dropped):
                scheduler.plan_ahead(batch)
            scheduler.update(batch, results)
            scheduler.learn(batch, 0.02 if step % 7 else 0.03)
            batch = scheduler.schedule()
        records = [s.request.acceptance for s in batch.scheduled]
        assert any(record.expected for record in records)
        learned = vars(policy._tries), vars(policy._memory)
        states.append((learned, records, [s.num_drafts for s in batch.scheduled]))
    assert states[0] == states[1]
