"""How many draft tokens each request gets in a step. Plain Python and numpy, no torch.

A draft token is worth the time it would have taken to commit its expected tokens without it, and costs what
the pass gets longer by. `AdaptiveSpeculation` spends draft tokens while they are worth more than they cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engine.batch import NOTHING, Allowance, SpeculationReport
from engine.costs import CostModel
from engine.messages import SpeculationState
from engine.scheduling.cost import CostCorrection
from engine.scheduling.drafting import Acceptance, Candidate, Drafts, Load, StepCost
from engine.scheduling.spending import Spending
from trees.family import TreeFamily

# Draft tokens that a step considers, all requests together, and of each at least: planning must take no time.
_MOST_OFFERS, _LEAST_OFFERS = 640, 8
_NO_OFFERS = np.zeros((2, 0))
_LONG_MEMORY = 0.99  # weight of all requests' past against the next step
# Estimated speed-up from which drafts are made in most steps: for one request, and more for each further one,
# up to so many. Tokens cost time outside the engine, too.
_WORTHWHILE, _WORTHWHILE_EACH, _CROWD = 1.05, 0.008, 16
# Steps without drafts between two that try them where the estimate is below.
_PAUSE = 3
# Of a token for each request: what a try may lose, and by how much that grows with each try that found drafts
# dearer. So drafts are made again some day, or nobody would find out that they are no longer dear.
_PATIENCE, _GROWING_PATIENCE = 0.05, 0.01
# After how many steps one goes without drafts: at first, and where the last such step's time was off by this
# share; and at most.
_SOON, _LATE, _SURPRISE = 4, 64, 0.1


class SpeculationPolicy(Protocol):
    """Decides about a step as often as it is asked, and learns of the step once it is made: a plan that is
    dropped leaves no trace."""

    def rests(self, num_committing: int) -> bool:
        """Whether the coming step goes without drafts whatever it is offered: then nothing need be, and
        `plan` is not asked."""
        ...

    def plan(self, load: Load, candidates: Sequence[Candidate]) -> list[Allowance]:
        """What each candidate may draft."""
        ...

    def settle(self) -> None:
        """The step is made as it was last decided."""
        ...

    def observe(self, acceptance: Acceptance, expected: float, num_accepted: int) -> None:
        """Learn how one request's drafts fared against what was expected of them."""
        ...

    def observe_step(self, step: StepCost) -> None:
        """Learn how long a pass took."""
        ...

    def report(self) -> SpeculationReport:
        """What it does at present."""
        ...


class FixedSpeculation:
    """The same number of draft tokens for everybody; 0 is speculation switched off."""

    def __init__(self, num_drafts: int) -> None:
        self.num_drafts = num_drafts

    def rests(self, num_committing: int) -> bool:
        return self.num_drafts == 0

    def plan(self, load: Load, candidates: Sequence[Candidate]) -> list[Allowance]:
        return [Allowance(min(self.num_drafts, candidate.limit)) for candidate in candidates]

    def settle(self) -> None:
        pass

    def observe(self, acceptance: Acceptance, expected: float, num_accepted: int) -> None:
        pass

    def observe_step(self, step: StepCost) -> None:
        pass

    def report(self) -> SpeculationReport:
        return SpeculationReport("fixed" if self.num_drafts else "off")


@dataclass
class _Decision:
    """About the coming step, kept apart until the step is made."""

    num_committing: int = 0
    due: bool = False  # it is to be unlike the others
    tries: bool = False  # it drafts although that promises little
    rests: bool = False
    doubtful: bool | None = None  # whether its plan promises too little, where there is one
    drafts: bool = False
    planned: list[Acceptance] = field(default_factory=list)
    unguessed: list[Acceptance] = field(default_factory=list)  # those of them that heads do not guess for


class AdaptiveSpeculation:
    """Chooses every request's tree size each step, by marginal gain over marginal time, down to none.

    Two plans compete: n-gram chains alone, which cost the tokens they add to the pass, and chains beside the
    heads' guesses, which cost the asking too. trims: whether trees are cut by how likely their nodes turn out
    to be; then the size is a guide, and sure guesses may go beyond it.
    """

    def __init__(self, family: TreeFamily, cost: CostModel, trims: bool = False) -> None:
        self._gains = np.array(family.gains)  # [num_drafts], falling
        self._cost = cost
        self._doubtful = False  # whether the last plan promised too little
        self._since_change = 0  # steps since one was unlike the others
        self._probe_after = _SOON
        self._num_committing = 0
        self._fruitless = 0  # tries since one drafted
        self._rested = 0  # steps that were not planned since the last one that was
        self._next: _Decision | None = None
        self._trims = trims
        self._overall = Acceptance()  # over all requests: the prior of each
        self._correction = CostCorrection()
        self._state: SpeculationState = "no_guess"
        self._estimated = 1.0  # speed-up of the last plan
        self._seconds_with = self._seconds_without = 0.0

    def rests(self, num_committing: int) -> bool:
        """Not all steps draft. One without drafts now and then tells what they cost, apart from what all
        steps cost. Where hardly anything is to be gained, the estimate is likelier to be wrong: there one
        with drafts now and then tells more, and the others do not even take the time to plan."""
        changed = num_committing != self._num_committing
        due = self._since_change >= (_PAUSE if self._doubtful else self._probe_after)
        rests = due != self._doubtful and (due or not changed)
        self._next = _Decision(num_committing, due, tries=due and self._doubtful, rests=rests)
        if rests:
            self._estimated, self._state = 1.0, "not_worthwhile" if self._doubtful else "probing"
        return rests

    def plan(self, load: Load, candidates: Sequence[Candidate]) -> list[Allowance]:
        self._estimated, self._state = 1.0, "no_guess"
        decision = self._next = self._next or _Decision(load.num_committing)
        decision.planned = [candidate.acceptance for candidate in candidates]
        if not candidates:
            return []
        prior = self._overall.ratio(1.0)
        ratios = [acceptance.ratio(prior, self._rested) for acceptance in decision.planned]
        allowances = self._choose(decision, load, candidates, ratios)
        decision.drafts = any(allowance.most for allowance in allowances)
        decision.unguessed = [
            acceptance
            for acceptance, allowance in zip(decision.planned, allowances, strict=True)
            if allowance.most == 0 or allowance.chain_only
        ]
        return allowances

    def settle(self) -> None:
        decision, self._next = self._next, None
        if decision is None:  # nobody could draft, so that it was not asked
            return
        self._num_committing = decision.num_committing
        self._since_change = 0 if decision.due else self._since_change + 1
        if decision.rests:
            self._overall.fade()
            self._rested += 1
            return
        if decision.doubtful is None:
            return
        self._doubtful = decision.doubtful
        if decision.drafts:
            self._fruitless = 0
        else:
            self._fruitless += decision.tries
        for acceptance in decision.planned:
            acceptance.fade(self._rested)
        self._rested = 0
        for acceptance in decision.unguessed:
            acceptance.fade()
        if len(decision.unguessed) == len(decision.planned):
            self._overall.fade()

    def _choose(
        self, decision: _Decision, load: Load, candidates: Sequence[Candidate], ratios: list[float]
    ) -> list[Allowance]:
        n = load.num_committing
        base = self._correction.base_seconds(self._cost.base_seconds(n, n, load.num_keys))
        most = max(_LEAST_OFFERS, _MOST_OFFERS // len(candidates))
        contexts = np.array([candidate.context for candidate in candidates])
        chains = [np.array((c.chain[: c.limit],) * 2) if c.chain else _NO_OFFERS for c in candidates]
        plans = [Spending(self._draft_seconds, load, base, chains, contexts, chain_only=True)]
        if len(self._gains):
            offers = self._offers(candidates, ratios, most)
            plans.append(Spending(self._draft_seconds, load, base, offers, contexts, chain_only=False))
        # What a second is worth: the best rate of a pass that only decodes. Prompt chunks in the pass change
        # what a draft token costs, not what a committed one is worth.
        best_rate = max(plan.best_rate for plan in plans)
        speed_up = best_rate * base / n
        patience = n * (_PATIENCE + _GROWING_PATIENCE * self._fruitless) if decision.tries else 0.0
        best = max(plans, key=lambda plan: plan.choose(best_rate, patience))
        worthwhile = _WORTHWHILE + _WORTHWHILE_EACH * min(n - 1, _CROWD)
        decision.doubtful = speed_up < worthwhile
        if decision.doubtful and not decision.tries:
            self._state = "not_worthwhile"
            return [NOTHING] * len(candidates)
        allowances = best.allowances(best_rate, [candidate.limit for candidate in candidates], self._trims)
        if any(allowance.most for allowance in allowances):
            self._estimated, self._state = speed_up, "ngrams" if best.chain_only else "heads"
        else:
            self._state = "not_worthwhile"
        return allowances

    def _offers(
        self, candidates: Sequence[Candidate], ratios: list[float], most: int
    ) -> list[NDArray[np.float64]]:
        """Each further draft token's gain, falling: [2, num_offers] for each candidate, as expected of this
        request, and as calibrated. Where a chain is right, branches beside it are wrong: they count for as
        much as the chain's first token is in doubt."""
        calibrated = self._gains[:most]
        expected = np.minimum(np.outer(ratios, calibrated), 1.0)
        offers = np.stack((expected, np.broadcast_to(calibrated, expected.shape)), axis=1)
        return [
            self._beside_chain(candidate.chain, gains)[:, : min(candidate.limit, most)]
            for candidate, gains in zip(candidates, offers, strict=True)
        ]

    @staticmethod
    def _beside_chain(chain: Sequence[float], gains: NDArray[np.float64]) -> NDArray[np.float64]:
        if not chain:
            return gains
        gains = np.concatenate(((chain, chain), gains * (1.0 - chain[0])), axis=1)
        return gains[:, np.argsort(-gains[0], kind="stable")]

    def observe(self, acceptance: Acceptance, expected: float, num_accepted: int) -> None:
        acceptance.observe(expected, num_accepted)
        self._overall.observe(expected, num_accepted, _LONG_MEMORY)

    def observe_step(self, step: StepCost) -> None:
        base = self._cost.base_seconds(step.num_known, step.num_known, step.num_keys)
        added = self._added_seconds(step.num_known, step.drafts)
        if step.probing:
            surprise = abs(step.seconds / self._correction.base_seconds(base) - 1.0)
            self._probe_after = _SOON if surprise > _SURPRISE else min(2 * self._probe_after, _LATE)
        self._correction.observe(base, float(added[0]), step.seconds)
        without = self._correction.base_seconds(base) * step.num_committed / step.num_known
        self._seconds_without = _LONG_MEMORY * self._seconds_without + without
        self._seconds_with = _LONG_MEMORY * self._seconds_with + step.seconds

    def report(self) -> SpeculationReport:
        measured = self._seconds_without / self._seconds_with if self._seconds_with else 1.0
        return SpeculationReport(self._state, self._estimated, measured)

    def _added_seconds(self, num_known: int, drafts: Drafts) -> NDArray[np.float64]:
        """Modelled seconds that draft tokens add to a pass over `num_known` others, and guessing them."""
        with_drafts = self._cost.pass_seconds(num_known + drafts.num_drafts)
        without = self._cost.pass_seconds(np.array([num_known]))
        keys = np.maximum(drafts.keys - self._cost.context * drafts.num_drafts, 0)
        guessing = self._cost.guessing_seconds(drafts.num_guessing, drafts.depth)
        return np.asarray(with_drafts - without + self._cost.next_key * keys + guessing)

    def _draft_seconds(self, num_known: int, drafts: Drafts) -> NDArray[np.float64]:
        """The same as steps have taught it."""
        return self._correction.draft_seconds(self._added_seconds(num_known, drafts))
