"""Whatever comes in, whenever it leaves, and whatever drafts are worth: the tokens are the model's own."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.batch import Allowance, SpeculationReport
from engine.costs import CostModel
from engine.messages import SamplingParams
from engine.scheduling.pacing import TimedPacing
from engine.speculation.acceptance import Acceptance
from engine.speculation.facts import Candidate, Load, StepCost
from tests.engine.helpers import FakeRunner, continuation, make_scheduler, params, random_accept, run_step

MODEL_LEN = 40
COST = CostModel(passes=((1, 0.01), (8, 0.02)))  # a few tokens of a prompt take all the time there is


@dataclass(frozen=True)
class Arrival:
    step: int
    prompt: list[int]
    sampling: SamplingParams
    abort_at: int | None


class RandomSpeculation:
    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def rests(self, num_committing: int) -> bool:
        assert num_committing > 0
        return self._random.random() < 0.2

    def plan(self, load: Load, candidates: Sequence[Candidate]) -> list[Allowance]:
        sizes = [self._random.randint(0, candidate.limit) for candidate in candidates]
        return [Allowance(size, gains=(1.0,) * size) for size in sizes]

    def settle(self) -> None:
        pass

    def observe(self, acceptance: Acceptance, expected: float, num_accepted: int) -> None:
        assert 0 <= num_accepted <= expected
        assert expected > 0  # nothing is learned from a step that verified nothing

    def observe_step(self, step: StepCost) -> None:
        pass

    def report(self) -> SpeculationReport:
        return SpeculationReport("fixed")


# Few different tokens and a few common beginnings, so that prefixes are shared often.
prompts = st.builds(
    lambda head, tail: ([5, 6, 7, 8, 9, 10, 11, 12, 13] * 3)[:head] + tail,
    st.integers(0, 24),
    st.lists(st.integers(3, 6), min_size=1, max_size=6),
)
samplings = st.builds(
    params,
    st.integers(1, 30),
    min_tokens=st.sampled_from([0, 0, 5]),
    ignore_eos=st.booleans(),
    stop_token_ids=st.sampled_from([(), (), (11, 30, 41), tuple(range(20, 30))]),
    speculation=st.sampled_from([{}, {}, {"max_draft_tokens": 2}, {"enabled": False}]),
)
arrivals = st.lists(
    st.builds(Arrival, st.integers(0, 30), prompts, samplings, st.none() | st.integers(0, 40)),
    min_size=1,
    max_size=8,
)


@settings(max_examples=150, deadline=None)
@given(
    arrivals=arrivals,
    block_size=st.integers(1, 9),
    spare_blocks=st.integers(0, 12),
    max_num_seqs=st.integers(1, 6),
    spare_budget=st.integers(0, 20),
    max_drafts=st.integers(0, 12),
    seed=st.integers(0, 1000),
    paced=st.booleans(),
)
def test_every_request_gets_its_tokens_and_every_block_comes_back(
    arrivals: list[Arrival],
    block_size: int,
    spare_blocks: int,
    max_num_seqs: int,
    spare_budget: int,
    max_drafts: int,
    seed: int,
    paced: bool,
) -> None:
    scheduler = make_scheduler(
        num_blocks=-(-MODEL_LEN // block_size) + spare_blocks,
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        budget=max_num_seqs + spare_budget,
        max_model_len=MODEL_LEN,
        max_drafts=max_drafts,
        policy=RandomSpeculation(seed),
        pacing=TimedPacing(COST) if paced else None,
    )
    runner = FakeRunner(scheduler, random_accept(seed))
    tokens: dict[str, list[int]] = {str(i): [] for i in range(len(arrivals))}
    reasons: dict[str, str] = {}
    last_event = max(max(a.step, a.abort_at or 0) for a in arrivals)
    step = 0
    while scheduler.has_work() or step <= last_event:
        for name, arrival in enumerate(arrivals):
            if arrival.step == step:
                scheduler.add(str(name), arrival.prompt, arrival.sampling)
            if arrival.abort_at == step:
                scheduler.abort(str(name))
        _, outputs = run_step(scheduler, runner)
        for output in outputs:
            assert output.request_id not in reasons
            tokens[output.request_id] += output.token_ids
            if output.finish_reason is not None:
                reasons[output.request_id] = output.finish_reason
        step += 1
        assert step < 2000
    assert scheduler.pool.num_held == 0
    assert len(scheduler._seats) == max_num_seqs
    for name, arrival in enumerate(arrivals):
        expected = continuation(arrival.prompt, arrival.sampling, MODEL_LEN)
        got = tokens[str(name)]
        assert got == expected[: len(got)]
        assert (str(name) in reasons) == (got == expected)
        assert got == expected or arrival.abort_at is not None
