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

from trees.family import TreeFamily

_MEMORY = 0.9  # weight of a request's past against its next verified draft
_OVERALL_MEMORY = 0.99  # the same for all requests together
_FORGETTING = 0.98  # per step without drafts: an old verdict fades, so that speculation is tried again
_PRIOR_TOKENS = 2.0  # how many expected tokens the calibration weighs against a request's own record
_OFFSET_RATE = 0.05  # weight of one step's time in the running correction of the cost model


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
    """A request that could take up to `limit` draft tokens in this step."""

    acceptance: Acceptance
    limit: int


class SpeculationPolicy(Protocol):
    def plan(self, num_committing: int, num_tokens: int, candidates: Sequence[Candidate]) -> list[int]:
        """Draft tokens for each candidate.

        num_committing: requests that commit in this pass; num_tokens: known tokens in the pass.
        """
        ...

    def observe(self, acceptance: Acceptance, num_drafts: int, num_accepted: int) -> None:
        """Learn how one request's drafts fared."""
        ...

    def observe_step(self, num_tokens: int, num_drafting: int, seconds: float) -> None:
        """Learn how long a pass over `num_tokens` took in which `num_drafting` requests had drafts."""
        ...


class FixedSpeculation:
    """The same number of draft tokens for everybody; 0 is speculation switched off."""

    def __init__(self, num_drafts: int) -> None:
        self.num_drafts = num_drafts

    def plan(self, num_committing: int, num_tokens: int, candidates: Sequence[Candidate]) -> list[int]:
        return [min(self.num_drafts, candidate.limit) for candidate in candidates]

    def observe(self, acceptance: Acceptance, num_drafts: int, num_accepted: int) -> None:
        pass

    def observe_step(self, num_tokens: int, num_drafting: int, seconds: float) -> None:
        pass


Curve = tuple[tuple[int, float], ...]  # (count, seconds), rising counts


@dataclass(frozen=True)
class CostModel:
    """Seconds of a pass by its number of tokens, and of drafting by its number of requests, as measured.

    Between two points time is interpolated, beyond the last it goes on with the slope of the last two.
    """

    passes: Curve
    drafting: Curve

    def pass_seconds(self, num_tokens: NDArray[np.int64]) -> NDArray[np.float64]:
        return _interpolate(self.passes, num_tokens)

    def drafting_seconds(self, num_requests: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.where(num_requests > 0, _interpolate(self.drafting, num_requests), 0.0)


def _interpolate(points: Curve, at: NDArray[np.int64]) -> NDArray[np.float64]:
    counts = np.array([count for count, _ in points], dtype=np.float64)
    # More tokens never take less time: where the measurement says so, the smaller count was disturbed.
    seconds = np.minimum.accumulate(np.array([second for _, second in points])[::-1])[::-1]
    values = np.interp(at, counts, seconds)
    if len(points) > 1:
        slope = (seconds[-1] - seconds[-2]) / (counts[-1] - counts[-2])
        values += np.maximum(at - counts[-1], 0) * slope
    return np.asarray(values)


class AdaptiveSpeculation:
    """Chooses every request's tree size each step, by marginal gain over marginal time, down to none."""

    def __init__(self, family: TreeFamily, cost: CostModel) -> None:
        self._gains = np.array(family.gains)  # [num_drafts], falling
        self._expected = np.concatenate([[0.0], np.cumsum(self._gains)])  # [num_drafts + 1]
        self._cost = cost
        self._overall = Acceptance()  # over all requests: the prior of each
        self._offset = 0.0  # seconds a pass takes beyond the cost model: longer contexts, a busy machine

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
        gains = np.concatenate(
            [
                np.minimum(self._gains[: candidate.limit] * ratio, 1.0)
                for candidate, ratio in zip(candidates, ratios, strict=True)
            ]
        )
        limits = [min(candidate.limit, len(self._gains)) for candidate in candidates]
        owners = np.repeat(np.arange(len(candidates)), limits)
        is_first = np.concatenate([np.arange(limit) == 0 for limit in limits])
        order = np.argsort(-gains, kind="stable")
        total_gain = np.concatenate([[0.0], np.cumsum(gains[order])])  # [num_offers + 1]
        counts = np.arange(len(order) + 1)
        drafting = self._cost.drafting_seconds(np.concatenate([[0], np.cumsum(is_first[order])]))
        seconds = self._cost.pass_seconds(num_committing + counts) + drafting + self._offset
        # What a second is worth: the best rate of a pass that only decodes. Prompt chunks in the pass change
        # what a draft token costs, not what a committed one is worth.
        best_rate = float(np.max((num_committing + total_gain) / np.maximum(seconds, 1e-9)))
        extra = self._cost.pass_seconds(num_tokens + counts) + drafting
        chosen = int(np.argmax(total_gain - best_rate * extra))
        sizes = np.bincount(owners[order[:chosen]], minlength=len(candidates))
        return [int(size) for size in sizes]

    def observe(self, acceptance: Acceptance, num_drafts: int, num_accepted: int) -> None:
        expected = float(self._expected[num_drafts])
        acceptance.observe(expected, num_accepted)
        self._overall.observe(expected, num_accepted, _OVERALL_MEMORY)

    def observe_step(self, num_tokens: int, num_drafting: int, seconds: float) -> None:
        predicted = self._cost.pass_seconds(np.array([num_tokens]))
        predicted += self._cost.drafting_seconds(np.array([num_drafting]))
        self._offset += _OFFSET_RATE * (seconds - float(predicted[0]) - self._offset)
