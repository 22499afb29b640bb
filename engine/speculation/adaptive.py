"""The policy that spends draft tokens while they are worth more than they cost.

A draft token is worth the time it would have taken to commit its expected tokens without it, and costs what
the pass gets longer by. What is remembered between steps lies in `acceptance`, `tries` and `prices`; what
follows from it, in `allocation`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.batch import NOTHING, Allowance, SpeculationReport
from engine.costs import CostModel
from engine.messages import SpeculationState
from engine.speculation.acceptance import Acceptance, AcceptanceMemory
from engine.speculation.allocation import (
    allocate,
    allowances,
    chain_offers,
    head_offers,
    likelihood_that_pays,
    rank,
    roomy_allowances,
)
from engine.speculation.facts import Candidate, Load, StepCost
from engine.speculation.prices import Prices
from engine.speculation.tries import Tries, Turn
from trees.family import TreeFamily

_MEMORY = 0.99  # weight of past steps in the measured speed-up


@dataclass(frozen=True, slots=True)
class _Plan:
    """What was decided about the coming step: kept apart, and replaced, until the step is made."""

    turn: Turn
    state: SpeculationState
    speed_up: float = 1.0  # as estimated
    doubtful: bool | None = None  # whether it promises too little, where somebody could draft
    planned: Sequence[Acceptance] = ()
    allowances: Sequence[Allowance] = ()


class AdaptiveSpeculation:
    """Chooses every request's tree size each step, by marginal gain over marginal time, down to none.

    Two ways to spend compete: n-gram chains alone, which cost the tokens they add to the pass, and chains
    beside the heads' guesses, which cost the asking too. trims: whether trees are cut by how likely their
    nodes turn out to be; then the size is a guide, and sure guesses may go beyond it.
    """

    def __init__(self, family: TreeFamily, cost: CostModel, trims: bool = False) -> None:
        self._gains = np.array(family.gains)  # [num_drafts], falling
        self._trims = trims
        self._memory = AcceptanceMemory()
        self._tries = Tries()
        self._prices = Prices(cost)
        self._next: _Plan | None = None
        self._report: tuple[SpeculationState, float] = ("no_guess", 1.0)  # of the last decision
        self._seconds_with = self._seconds_without = 0.0

    def rests(self, num_committing: int) -> bool:
        turn = self._tries.turn(num_committing)
        state: SpeculationState = "no_guess"
        if turn.rests:
            state = "not_worthwhile" if self._tries.doubtful else "probing"
        self._decide(_Plan(turn, state))
        return turn.rests

    def plan(self, load: Load, candidates: Sequence[Candidate]) -> list[Allowance]:
        turn = self._next.turn if self._next else Turn(load.num_committing)
        plan = self._plan(turn, load, candidates) if candidates else _Plan(turn, "no_guess")
        self._decide(plan)
        return list(plan.allowances)

    def _decide(self, plan: _Plan) -> None:
        self._next, self._report = plan, (plan.state, plan.speed_up)

    def _plan(self, turn: Turn, load: Load, candidates: Sequence[Candidate]) -> _Plan:
        n, price = load.num_committing, self._prices.draft_seconds
        planned = [candidate.acceptance for candidate in candidates]
        contexts = np.array([candidate.context for candidate in candidates])
        base = self._prices.base_seconds(n, load.num_keys)
        rankings = []
        if not len(self._gains) or any(candidate.chain for candidate in candidates):
            rankings.append(rank(load, base, price, chain_offers(candidates), contexts, chain_only=True))
        if len(self._gains):
            offers = head_offers(candidates, self._memory.ratios(planned), self._gains)
            rankings.append(rank(load, base, price, offers, contexts, chain_only=False))
        # What a second is worth: the best rate of a pass that only decodes. Prompt chunks in the pass change
        # what a draft token costs, not what a committed one is worth.
        rate = max(ranking.best_rate for ranking in rankings)
        speed_up = rate * base / n
        doubtful = self._tries.is_doubtful(speed_up, n)
        if doubtful and not turn.tries:
            return _Plan(turn, "not_worthwhile", 1.0, doubtful, planned, [NOTHING] * len(candidates))
        ranking, size = allocate(rankings, rate, load.budget, self._tries.patience(turn))
        if not size:
            return _Plan(turn, "not_worthwhile", 1.0, doubtful, planned, [NOTHING] * len(candidates))
        if self._trims and not ranking.chain_only:
            least = likelihood_that_pays(load, price, size, contexts, rate)
            limits = [candidate.limit for candidate in candidates]
            allowed = roomy_allowances(ranking, size, limits, least, load.budget)
        else:
            allowed = allowances(ranking, size)
        state: SpeculationState = "ngrams" if ranking.chain_only else "heads"
        return _Plan(turn, state, speed_up, doubtful, planned, allowed)

    def settle(self) -> None:
        plan, self._next = self._next, None
        if plan is None:  # nobody could draft, so that it was not asked
            return
        self._tries.settle(plan.turn)
        if plan.turn.rests:
            self._memory.rest()
        elif plan.doubtful is not None:
            drafts = any(allowance.most for allowance in plan.allowances)
            self._tries.settle_plan(plan.turn, plan.doubtful, drafts)
            unguessed = [
                record
                for record, allowance in zip(plan.planned, plan.allowances, strict=True)
                if allowance.most == 0 or allowance.chain_only
            ]
            self._memory.settle(plan.planned, unguessed)

    def observe(self, acceptance: Acceptance, expected: float, num_accepted: int) -> None:
        self._memory.observe(acceptance, expected, num_accepted)

    def observe_step(self, step: StepCost) -> None:
        if step.probing:
            usual = self._prices.base_seconds(step.num_known, step.num_keys)
            self._tries.observe_probe(abs(step.seconds / usual - 1.0))
        self._prices.observe(step)
        usual = self._prices.base_seconds(step.num_known, step.num_keys)
        without = usual * step.num_committed / step.num_known
        self._seconds_without = _MEMORY * self._seconds_without + without
        self._seconds_with = _MEMORY * self._seconds_with + step.seconds

    def report(self) -> SpeculationReport:
        measured = self._seconds_without / self._seconds_with if self._seconds_with else 1.0
        return SpeculationReport(*self._report, measured)
