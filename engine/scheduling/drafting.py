"""What speculation is decided by, and what is decided: plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from engine.messages import SpeculationState

_MEMORY = 0.9  # weight of a request's past against its next verified draft
_FORGETTING = 0.98  # per step without drafts: an old verdict fades, so that speculation is tried again
_PRIOR_TOKENS = 2.0  # how many expected tokens the calibration weighs against a request's own record


@dataclass(slots=True)
class Acceptance:
    """How the drafts of one request fare against what calibration expects of them."""

    expected: float = 0.0
    accepted: float = 0.0

    def ratio(self, prior: float, rested: int = 0) -> float:
        """Accepted over expected tokens, starting from `prior` where little has been seen; rested: steps
        without drafts that it has not been told of by `fade`."""
        kept = _FORGETTING**rested
        return (_PRIOR_TOKENS * prior + kept * self.accepted) / (_PRIOR_TOKENS + kept * self.expected)

    def observe(self, expected: float, accepted: int, memory: float = _MEMORY) -> None:
        self.expected = memory * self.expected + expected
        self.accepted = memory * self.accepted + accepted

    def fade(self, steps: int = 1) -> None:
        """Forget a little for every step without drafts."""
        self.expected *= _FORGETTING**steps
        self.accepted *= _FORGETTING**steps


@dataclass(slots=True)
class Candidate:
    """A request that could take up to `limit` draft tokens in this step.

    chain: probabilities that the guesses of an n-gram chain are right, each with all before it.
    """

    acceptance: Acceptance
    limit: int
    chain: Sequence[float] = ()
    context: int = 0  # positions it has computed


@dataclass(frozen=True, slots=True)
class Allowance:
    """What a request may draft in a step: at most `most` tokens, none that is less likely than `least`.

    gains: what each of the draft tokens is to commit by calibration, the likeliest first. They may be fewer
    than `most`, which leaves room for guesses that turn out to be surer than usual.
    chain_only: its n-gram chain makes all of them, and the heads are not asked.
    """

    most: int = 0
    least: float = 0.0
    gains: Sequence[float] = ()
    chain_only: bool = False

    @property
    def expected(self) -> float:
        """Draft tokens it is to commit by calibration, the measure of what it will commit."""
        return sum(self.gains)

    def granted(self, size: int) -> Allowance:
        """What is left of it where there is room, or there are guesses, for `size` draft tokens."""
        if size >= self.most:
            return self
        return replace(self, most=size, gains=self.gains[:size]) if size > 0 else NOTHING


NOTHING = Allowance()


@dataclass(frozen=True, slots=True)
class Load:
    """A pass as it is before drafts: requests that commit in it, known tokens of all its requests, and
    positions that those which commit have computed."""

    num_committing: int
    num_tokens: int
    num_keys: int = 0


@dataclass(frozen=True, slots=True)
class StepCost:
    """What a step without prompt chunks was made of, and how long it took."""

    num_known: int  # requests, each with its root
    num_keys: int  # positions that they have computed
    num_committed: int  # tokens
    num_drafts: int
    draft_keys: int  # those of each draft token's request, summed up
    num_guessing: int  # requests that heads guessed for
    depth: int  # levels that heads were asked for, 0 where they were not
    seconds: float
    probing: bool = False  # whether it went without drafts to learn what they cost

    @property
    def drafts(self) -> Drafts:
        counts = (self.num_drafts, self.draft_keys, self.num_guessing, max(self.depth, 1))
        return Drafts(*(np.array([count]) for count in counts))


@dataclass(frozen=True, slots=True)
class Drafts:
    """Draft tokens of a pass as far as their price goes; the entries belong together, one for each plan."""

    num_drafts: NDArray[np.int64]
    keys: NDArray[np.int64]  # computed positions of each draft token's request, summed up
    num_guessing: NDArray[np.int64]  # requests that heads guess for
    depth: NDArray[np.int64]  # levels that heads are asked for, at least 1


@dataclass(frozen=True, slots=True)
class SpeculationReport:
    """What speculation does, for people. Speed-ups are over decoding without drafts: `estimated` for the last
    step, before it was made, `measured` over the last hundred or so, against what such steps cost."""

    state: SpeculationState
    estimated: float = 1.0
    measured: float = 1.0
