"""When steps draft, and when one is made unlike the others to learn from it."""

from __future__ import annotations

from dataclasses import dataclass

# Estimated speed-up from which drafts are made in most steps: for one request, and more for each further one,
# up to so many. Tokens cost time outside the engine, too.
_WORTHWHILE, _WORTHWHILE_EACH, _CROWD = 1.05, 0.008, 16
# Steps without drafts between two that try them where the estimate is below.
_PAUSE = 3
# Tokens per request that a trial step may lose, and what is added after each failed trial. So drafts are made
# again some day, or nobody would find out that they are no longer dear.
_PATIENCE, _GROWING_PATIENCE = 0.05, 0.01
# After how many steps one goes without drafts: at first, and where the last such step's time was off by this
# share; and at most.
_SOON, _LATE, _SURPRISE = 4, 64, 0.1


@dataclass(frozen=True, slots=True)
class Turn:
    """What kind of step the coming one is."""

    num_committing: int
    due: bool = False  # it is to be unlike the others
    tries: bool = False  # it drafts although that promises little
    rests: bool = False  # it goes without drafts, and nothing is planned


class Tries:
    """Not all steps draft. One without drafts now and then tells what they cost, apart from what all steps
    cost. Where hardly anything is to be gained, the estimate is likelier to be wrong: there one with drafts
    now and then tells more, and the others do not even take the time to plan."""

    def __init__(self) -> None:
        self.doubtful = False  # whether the last plan promised too little
        self._since_change = 0  # steps since one was unlike the others
        self._probe_after = _SOON
        self._num_committing = 0
        self._fruitless = 0  # tries since one drafted

    def turn(self, num_committing: int) -> Turn:
        """Of the coming step. It counts once the step is settled."""
        changed = num_committing != self._num_committing
        due = self._since_change >= (_PAUSE if self.doubtful else self._probe_after)
        rests = due != self.doubtful and (due or not changed)
        return Turn(num_committing, due, tries=due and self.doubtful, rests=rests)

    def is_doubtful(self, speed_up: float, num_committing: int) -> bool:
        """Whether this estimate promises too little to draft in most steps."""
        return speed_up < _WORTHWHILE + _WORTHWHILE_EACH * min(num_committing - 1, _CROWD)

    def patience(self, turn: Turn) -> float:
        """Tokens of all requests together that drafts of this step may lose and still be made."""
        if not turn.tries:
            return 0.0
        return turn.num_committing * (_PATIENCE + _GROWING_PATIENCE * self._fruitless)

    def settle(self, turn: Turn) -> None:
        """The step was made."""
        self._num_committing = turn.num_committing
        self._since_change = 0 if turn.due else self._since_change + 1

    def settle_plan(self, turn: Turn, doubtful: bool, drafts: bool) -> None:
        """It was made by a plan. drafts: whether that let anybody draft."""
        self.doubtful = doubtful
        self._fruitless = 0 if drafts else self._fruitless + turn.tries

    def observe_probe(self, surprise: float) -> None:
        """Learn from a step without drafts that was to tell what they cost. surprise: by what share of the
        estimate its time was off."""
        self._probe_after = _SOON if surprise > _SURPRISE else min(2 * self._probe_after, _LATE)
