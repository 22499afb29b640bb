"""What the scheduler asks of speculation, and the policy that always answers the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from engine.batch import Allowance, SpeculationReport
from engine.speculation.acceptance import Acceptance
from engine.speculation.allocation import share_evenly
from engine.speculation.facts import Candidate, Load, StepCost


class SpeculationPolicy(Protocol):
    """Decides about a step as often as it is asked, and learns of the step once it is made: a plan that is
    dropped leaves no trace."""

    def rests(self, num_committing: int) -> bool:
        """Whether the coming step goes without drafts whatever it is offered: then nothing need be, and
        `plan` is not asked."""
        ...

    def plan(self, load: Load, candidates: Sequence[Candidate]) -> list[Allowance]:
        """What each candidate may draft; together no more than the load's budget."""
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
        limits = [min(self.num_drafts, candidate.limit) for candidate in candidates]
        return [Allowance(size) for size in share_evenly(limits, load.budget)]

    def settle(self) -> None:
        pass

    def observe(self, acceptance: Acceptance, expected: float, num_accepted: int) -> None:
        pass

    def observe_step(self, step: StepCost) -> None:
        pass

    def report(self) -> SpeculationReport:
        return SpeculationReport("fixed" if self.num_drafts else "off")
