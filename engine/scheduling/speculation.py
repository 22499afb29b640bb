"""How many draft tokens each request gets in a step. Plain Python and numpy, no torch.

A draft token is worth the time it would have taken to commit its expected tokens without it, and costs what
the pass gets longer by. `AdaptiveSpeculation` spends draft tokens while they are worth more than they cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engine.scheduling.cost import CostCorrection, CostModel
from trees.family import TreeFamily

_MEMORY = 0.9  # weight of a request's past against its next verified draft
_OVERALL_MEMORY = 0.99  # the same for all requests together
_FORGETTING = 0.98  # per step without drafts: an old verdict fades, so that speculation is tried again
_PRIOR_TOKENS = 2.0  # how many expected tokens the calibration weighs against a request's own record


@dataclass(slots=True)
class Acceptance:
    """How the drafts of one request fare against what calibration expects of them."""

    expected: float = 0.0
    accepted: float = 0.0

    def ratio(self, prior: float) -> float:
        """Accepted over expected tokens, starting from `prior` where little has been seen."""
        return (_PRIOR_TOKENS * prior + self.accepted) / (_PRIOR_TOKENS + self.expected)

    def observe(self, expected: float, accepted: int, memory: float = _MEMORY) -> None:
        self.expected = memory * self.expected + expected
        self.accepted = memory * self.accepted + accepted

    def fade(self) -> None:
        self.expected *= _FORGETTING
        self.accepted *= _FORGETTING


@dataclass(slots=True)
class Candidate:
    """A request that could take up to `limit` draft tokens in this step.

    chain: probabilities that the guesses of an n-gram chain are right, each with all before it; gains: what
    each further draft token is expected to commit, put there by the policy.
    """

    acceptance: Acceptance
    limit: int
    chain: Sequence[float] = ()
    gains: Sequence[float] = ()


class SpeculationPolicy(Protocol):
    def plan(self, num_committing: int, num_tokens: int, candidates: Sequence[Candidate]) -> list[int]:
        """Draft tokens for each candidate.

        num_committing: requests that commit in this pass; num_tokens: known tokens in the pass.
        """
        ...

    def observe(self, acceptance: Acceptance, expected: float, num_accepted: int) -> None:
        """Learn how one request's drafts fared against what was expected of them."""
        ...

    def observe_step(self, num_known: int, num_drafts: int, num_drafting: int, seconds: float) -> None:
        """Learn how long a pass over known and draft tokens took in which `num_drafting` requests drafted."""
        ...


class FixedSpeculation:
    """The same number of draft tokens for everybody; 0 is speculation switched off."""

    def __init__(self, num_drafts: int) -> None:
        self.num_drafts = num_drafts

    def plan(self, num_committing: int, num_tokens: int, candidates: Sequence[Candidate]) -> list[int]:
        return [min(self.num_drafts, candidate.limit) for candidate in candidates]

    def observe(self, acceptance: Acceptance, expected: float, num_accepted: int) -> None:
        pass

    def observe_step(self, num_known: int, num_drafts: int, num_drafting: int, seconds: float) -> None:
        pass


class AdaptiveSpeculation:
    """Chooses every request's tree size each step, by marginal gain over marginal time, down to none."""

    def __init__(self, family: TreeFamily, cost: CostModel) -> None:
        self._gains = np.array(family.gains)  # [num_drafts], falling
        self._cost = cost
        self._overall = Acceptance()  # over all requests: the prior of each
        self._correction = CostCorrection()

    def plan(self, num_committing: int, num_tokens: int, candidates: Sequence[Candidate]) -> list[int]:
        prior = self._overall.ratio(1.0)
        ratios = [candidate.acceptance.ratio(prior) for candidate in candidates]
        sizes = self._choose(num_committing, num_tokens, candidates, ratios) if candidates else []
        for candidate, size in zip(candidates, sizes, strict=True):
            if size == 0:
                candidate.acceptance.fade()
        if candidates and not any(sizes):
            self._overall.fade()
        return sizes

    def _choose(
        self, num_committing: int, num_tokens: int, candidates: Sequence[Candidate], ratios: list[float]
    ) -> list[int]:
        offers = [self._offers(candidate) for candidate in candidates]
        for candidate, offer in zip(candidates, offers, strict=True):
            candidate.gains = offer.tolist()
        limits = [len(offer) for offer in offers]
        gains = np.minimum(np.concatenate(offers) * np.repeat(ratios, limits), 1.0)
        owners = np.repeat(np.arange(len(candidates)), limits)
        is_first = np.concatenate([np.arange(limit) == 0 for limit in limits])
        order = np.argsort(-gains, kind="stable")
        total_gain = np.concatenate([[0.0], np.cumsum(gains[order])])  # [num_offers + 1]
        counts = np.arange(len(order) + 1)
        num_drafting = np.concatenate([[0], np.cumsum(is_first[order])])
        base = self._correction.base_seconds(float(self._cost.pass_seconds(np.array([num_committing]))[0]))
        alone = base + self._correction.draft_seconds(self._added(num_committing, counts, num_drafting))
        # What a second is worth: the best rate of a pass that only decodes. Prompt chunks in the pass change
        # what a draft token costs, not what a committed one is worth.
        best_rate = float(np.max((num_committing + total_gain) / alone))
        here = self._correction.draft_seconds(self._added(num_tokens, counts, num_drafting))
        chosen = int(np.argmax(total_gain - best_rate * here))
        sizes = np.bincount(owners[order[:chosen]], minlength=len(candidates))
        return [int(size) for size in sizes]

    def _offers(self, candidate: Candidate) -> NDArray[np.float64]:
        """Expected gain of each further draft token, falling. Where the chain is right, branches beside it
        are wrong: they count for as much as the chain's first token is in doubt."""
        if not candidate.chain:
            return self._gains[: candidate.limit]
        chain = np.array(candidate.chain)
        offers = np.concatenate((chain, self._gains * (1.0 - chain[0])))
        return -np.sort(-offers)[: candidate.limit]

    def observe(self, acceptance: Acceptance, expected: float, num_accepted: int) -> None:
        acceptance.observe(expected, num_accepted)
        self._overall.observe(expected, num_accepted, _OVERALL_MEMORY)

    def observe_step(self, num_known: int, num_drafts: int, num_drafting: int, seconds: float) -> None:
        base = float(self._cost.pass_seconds(np.array([num_known]))[0])
        added = self._added(num_known, np.array([num_drafts]), np.array([num_drafting]))
        self._correction.observe(base, float(added[0]), seconds)

    def _added(
        self, num_known: int, num_drafts: NDArray[np.int64], num_drafting: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """Modelled seconds that draft tokens add to a pass over `num_known` others."""
        with_drafts = self._cost.pass_seconds(num_known + num_drafts)
        without = self._cost.pass_seconds(np.array([num_known]))
        return with_drafts - without + self._cost.drafting_seconds(num_drafting)
