"""A token budget is spent where it gains most, and never exceeded."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.batch import Allowance
from engine.costs import CostModel
from engine.speculation.acceptance import Acceptance
from engine.speculation.adaptive import AdaptiveSpeculation
from engine.speculation.allocation import share_evenly
from engine.speculation.facts import Candidate, Load
from engine.speculation.policy import FixedSpeculation, SpeculationPolicy
from tests.engine.families import full
from trees.family import TreeFamily

COST = CostModel(passes=((1, 0.03), (64, 0.031)), first_level=((1, 1e-4),), all_levels=((1, 2e-4),))
STEEP = CostModel(passes=((1, 0.03), (128, 0.0935)))
FAMILY = TreeFamily(full(24).paths, tuple(0.6 * 0.8**n for n in range(24)))
GOOD, BAD = Acceptance(20.0, 20.0), Acceptance(20.0, 2.0)
acceptances = st.builds(
    lambda expected, share: Acceptance(expected, share * expected), st.floats(0, 50), st.floats(0, 1.2)
)
candidates = st.builds(
    Candidate,
    acceptances,
    st.integers(1, 24),
    st.sampled_from([(), (), (0.9, 0.8, 0.7), (0.3,)]),
    st.integers(0, 500),
)


def plan(
    budget: int | None, *candidates: Candidate, trims: bool = False, cost: CostModel = COST
) -> list[Allowance]:
    load = Load(len(candidates), len(candidates), budget=budget)
    return AdaptiveSpeculation(FAMILY, cost, trims).plan(load, candidates)


@pytest.mark.parametrize("trims", [False, True])
def test_a_short_budget_goes_to_the_guesses_that_gain_most(trims: bool) -> None:
    """Whoever comes first: the request whose drafts are accepted gets more than those whose are not."""
    for place in range(3):
        requests = [Candidate(BAD, 24) for _ in range(3)]
        requests[place] = Candidate(GOOD, 24)
        sizes = [allowance.most for allowance in plan(8, *requests, trims=trims)]
        assert sum(sizes) == 8
        assert sizes[place] > 8 - sizes[place]


def test_equal_requests_share_a_short_budget() -> None:
    sizes = [allowance.most for allowance in plan(12, *(Candidate(GOOD, 24) for _ in range(4)))]
    assert sizes == [3] * 4


def test_room_for_surer_guesses_is_shared_too() -> None:
    requests = [Candidate(GOOD, 24) for _ in range(4)]
    without_limit = plan(None, *requests, trims=True, cost=STEEP)
    most, needed = sum(a.most for a in without_limit), sum(len(a.gains) for a in without_limit)
    assert needed < most
    for budget in range(needed, most):
        allowances = plan(budget, *requests, trims=True, cost=STEEP)
        assert [a.gains for a in allowances] == [a.gains for a in without_limit]
        sizes = [a.most for a in allowances]
        assert sum(sizes) <= budget and max(sizes) - min(sizes) <= 1


@settings(deadline=None)
@given(
    requests=st.lists(candidates, min_size=1, max_size=6),
    budget=st.integers(1, 80),
    trims=st.booleans(),
    fixed=st.booleans(),
)
def test_no_policy_exceeds_the_budget(
    requests: list[Candidate], budget: int, trims: bool, fixed: bool
) -> None:
    policy: SpeculationPolicy = FixedSpeculation(9) if fixed else AdaptiveSpeculation(FAMILY, COST, trims)
    load = Load(len(requests), len(requests), budget=budget)
    allowances = policy.plan(load, requests)
    assert sum(a.most for a in allowances) <= budget
    assert all(a.most <= c.limit for a, c in zip(allowances, requests, strict=True))


@settings(deadline=None)
@given(requests=st.lists(candidates, min_size=1, max_size=6), budget=st.integers(1, 80))
def test_a_short_budget_loses_the_least_promising_guesses(requests: list[Candidate], budget: int) -> None:
    """What is left out gains no more than anything that is taken."""
    free = [Candidate(c.acceptance, c.limit) for c in requests]  # heads alone, whose gains are the family's
    ratios = [c.acceptance.ratio(1.0) for c in free]
    sizes = [a.most for a in plan(budget, *free)]
    if sum(sizes) == budget:
        gains = [
            np.minimum(ratio * np.array(FAMILY.gains), 1.0)[: c.limit]
            for ratio, c in zip(ratios, free, strict=True)
        ]
        taken = min(gain[size - 1] for gain, size in zip(gains, sizes, strict=True) if size)
        left = max(
            (gain[size] for gain, size in zip(gains, sizes, strict=True) if size < len(gain)), default=0.0
        )
        assert left <= taken


@given(limits=st.lists(st.integers(0, 20), max_size=8), budget=st.none() | st.integers(0, 100))
def test_even_shares_use_the_budget_up(limits: list[int], budget: int | None) -> None:
    sizes = share_evenly(limits, budget)
    assert sum(sizes) == (sum(limits) if budget is None else min(budget, sum(limits)))
    assert all(0 <= size <= limit for size, limit in zip(sizes, limits, strict=True))
    short = [size for size, limit in zip(sizes, limits, strict=True) if size < limit]
    assert not short or max(sizes) - min(short) <= 1


def test_the_last_request_gets_its_share_of_a_fixed_size() -> None:
    allowances = FixedSpeculation(8).plan(Load(3, 3, budget=9), [Candidate(Acceptance(), 8)] * 3)
    assert [allowance.most for allowance in allowances] == [3, 3, 3]
