"""How drafts fare against what calibration expects of them: what is remembered of each request and of all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_MEMORY = 0.9  # weight of a request's past against its next verified draft
_LONG_MEMORY = 0.99  # weight of all requests' past against the next draft of one of them
_FORGETTING = 0.98  # per step without drafts: an old verdict fades, so that speculation is tried again
_PRIOR_TOKENS = 2.0  # how many expected tokens the calibration weighs against a request's own record


@dataclass(slots=True)
class Acceptance:
    """The record of one request."""

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


class AcceptanceMemory:
    """The records of all requests: each request keeps its own, the sum of them is the prior of each."""

    def __init__(self) -> None:
        self._overall = Acceptance()
        self._rested = 0  # steps without a plan since the last one that had one

    def ratios(self, records: Iterable[Acceptance]) -> list[float]:
        prior = self._overall.ratio(1.0)
        return [record.ratio(prior, self._rested) for record in records]

    def observe(self, record: Acceptance, expected: float, num_accepted: int) -> None:
        """Learn how one request's drafts fared."""
        record.observe(expected, num_accepted)
        self._overall.observe(expected, num_accepted, _LONG_MEMORY)

    def rest(self) -> None:
        """A step was made that nothing was planned for."""
        self._overall.fade()
        self._rested += 1

    def settle(self, planned: Sequence[Acceptance], unguessed: Sequence[Acceptance]) -> None:
        """A planned step was made. unguessed: records of those requests that heads do not guess for in it."""
        for record in planned:
            record.fade(self._rested)
        self._rested = 0
        for record in unguessed:
            record.fade()
        if len(unguessed) == len(planned):
            self._overall.fade()
