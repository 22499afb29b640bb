"""What drafts are granted is what is expected of them, and planning them is no reason to fail."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from engine.batch import NOTHING, Allowance
from engine.costs import CostModel
from engine.scheduling.scheduler import Scheduler
from engine.speculation.acceptance import Acceptance
from engine.speculation.adaptive import AdaptiveSpeculation
from engine.speculation.facts import Candidate, Load, StepCost
from engine.speculation.policy import FixedSpeculation
from tests.engine.families import full
from tests.engine.helpers import FakeRunner, make_scheduler, params, run_all, run_step

GAINS = tuple(0.5**n for n in range(1, 9))


class Recording(FixedSpeculation):
    """Wants eight draft tokens, and keeps what it is told of them."""

    def __init__(self) -> None:
        super().__init__(8)
        self.observed: list[tuple[float, int]] = []

    def plan(self, load: Load, candidates: Sequence[Candidate]) -> list[Allowance]:
        return [Allowance(min(8, c.limit), gains=GAINS[: c.limit]) for c in candidates]

    def observe(self, acceptance: Acceptance, expected: float, num_accepted: int) -> None:
        self.observed.append((expected, num_accepted))


def second_step(policy: Recording, **settings: int) -> Scheduler:
    """After the step in which a request of five tokens would draft eight."""
    scheduler = make_scheduler(policy=policy, **settings)
    runner = FakeRunner(scheduler, accept=lambda drafts: min(drafts, 1))
    scheduler.add("a", [5, 6, 7, 8, 9], params(20, ignore_eos=True))
    while not run_step(scheduler, runner)[1]:
        pass
    run_step(scheduler, runner)
    return scheduler


@pytest.mark.parametrize(
    ("settings", "granted"),
    [({"budget": 64}, 8), ({"budget": 4}, 3), ({"num_blocks": 2, "block_size": 4}, 2)],
    ids=["enough", "budget", "blocks"],
)
def test_expectation_is_that_of_what_was_granted(settings: dict[str, int], granted: int) -> None:
    policy = Recording()
    second_step(policy, **settings)
    assert policy.observed == [(pytest.approx(sum(GAINS[:granted])), 1)]


def test_nothing_is_learned_from_drafts_that_there_was_no_room_for() -> None:
    policy = Recording()
    second_step(policy, budget=1)
    assert policy.observed == []


def test_a_record_is_the_same_beside_a_prompt_as_alone() -> None:
    """A stream whose drafts fare as calibrated, under a budget that a prompt could fill."""
    ratios = []
    for beside in (False, True):
        costs = CostModel(passes=((1, 0.01), (64, 0.011)), first_level=((1, 1e-4),), all_levels=((1, 2e-4),))
        policy = AdaptiveSpeculation(full(16), costs)
        scheduler = make_scheduler(
            num_blocks=500, max_model_len=1700, budget=32, policy=policy, max_drafts=16
        )
        runner = FakeRunner(scheduler, accept=lambda drafts: min(drafts, 2))
        scheduler.add("stream", [5, 6, 7], params(100, ignore_eos=True))
        run_step(scheduler, runner)
        if beside:
            scheduler.add("long", [9] * 1500, params(1))
        for _ in range(25):
            batch, _ = run_step(scheduler, runner)
        record = next(s.request for s in batch.scheduled if s.request.request_id == "stream").acceptance
        assert ("long" in scheduler) == beside and record.accepted > 0
        ratios.append(record.ratio(1.0))
    assert ratios[1] >= 0.95 * ratios[0]


def test_an_allowance_that_is_cut_to_nothing_is_none() -> None:
    allowance = Allowance(8, gains=(0.5, 0.25))
    assert allowance.granted(9) == allowance
    assert allowance.granted(4) == Allowance(4, gains=(0.5, 0.25))
    assert allowance.granted(1) == Allowance(1, gains=(0.5,))
    assert allowance.granted(0) == NOTHING


@pytest.mark.parametrize("count", [1, 4095, 4096, 20_000])
def test_thousands_of_requests_have_a_price(count: int) -> None:
    costs = CostModel(
        passes=((1, 0.01), (128, 0.02)),
        first_level=((1, 1e-3), (64, 2e-3)),
        all_levels=((1, 2e-3), (64, 4e-3)),
        levels=3,
    )
    seconds = costs.guessing_seconds(np.arange(count + 1), np.full(count + 1, 2))
    assert len(seconds) == count + 1 and seconds[0] == 0.0 and np.all(np.diff(seconds) > 0)
    policy = AdaptiveSpeculation(full(8), costs)
    allowances = policy.plan(Load(count, count), [Candidate(Acceptance(), 8) for _ in range(count)])
    assert len(allowances) == count
    policy.observe_step(StepCost(count, 0, count, count, 0, count, 1, 0.1))


class Broken(FixedSpeculation):
    """Raises in one of its methods."""

    def __init__(self, method: str) -> None:
        super().__init__(4)
        setattr(self, method, self._fail)

    def _fail(self, *_: object) -> None:
        raise IndexError("index 4096 is out of bounds")


@pytest.mark.parametrize("method", ["rests", "plan", "settle", "observe", "observe_step", "report"])
def test_a_policy_that_raises_costs_drafts_and_nothing_else(
    method: str, caplog: pytest.LogCaptureFixture
) -> None:
    scheduler = make_scheduler(policy=Broken(method))
    runner = FakeRunner(scheduler)
    for name in "ab":
        scheduler.add(name, [5, 6, ord(name)], params(12, ignore_eos=True))
    for _ in range(4):
        batch, _ = run_step(scheduler, runner)
        scheduler.learn(batch, 0.01)
    tokens, batches = run_all(scheduler, runner)
    assert set(tokens) == {"a", "b"}
    assert not any(s.num_drafts for batch in batches for s in batch.scheduled)
    assert len([r for r in caplog.records if "go without" in r.message]) == 1
