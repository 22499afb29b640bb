"""What passes and drafts cost: the start-up measurement (`engine.costs`), corrected by what steps took."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engine.costs import CostModel
from engine.speculation.facts import Drafts, StepCost
from engine.speculation.tracker import Tracker

# Drafts are taken for dearer than measured at first. If they are cheaper, the steps that make them show it.
# If they are dearer, no harm was done meanwhile.
_CAUTION = 1.15
_DEVIATION = (0.02, 0.5, 0.5)  # of the correction before any step was seen: seconds, factor, factor


class Prices:
    """Seconds of a pass and of drafts.

    A step is taken to last `constant + base_factor * base + draft_factor * drafts`, where the cost model says
    what its known tokens (base) and its draft tokens take. Longer contexts, more requests for the same tokens
    or a busy machine make one or the other dearer. The three numbers begin at (0, 1, 1.15); `observe` learns.
    """

    def __init__(self, cost: CostModel) -> None:
        self._cost = cost
        self._tracker = Tracker((0.0, 1.0, _CAUTION), _DEVIATION)

    def base_seconds(self, num_committing: int, num_keys: int) -> float:
        """Of a pass over the roots of so many requests, without drafts; num_keys: positions that they have
        computed."""
        base = self._cost.base_seconds(num_committing, num_committing, num_keys)
        constant, factor, _ = self._tracker.state
        return max(float(constant + factor * base), 0.2 * base, 1e-9)

    def draft_seconds(self, num_known: int, drafts: Drafts) -> NDArray[np.float64]:
        """What draft tokens add to a pass over `num_known` other tokens, guessing included."""
        return max(float(self._tracker.state[2]), 0.2) * self._modelled(num_known, drafts)

    def observe(self, step: StepCost) -> None:
        """Learn from how long a step took."""
        base = self._cost.base_seconds(step.num_known, step.num_known, step.num_keys)
        drafts = float(self._modelled(step.num_known, step.drafts)[0])
        self._tracker.observe((1.0, base, drafts), step.seconds, least=base)

    def _modelled(self, num_known: int, drafts: Drafts) -> NDArray[np.float64]:
        with_drafts = self._cost.pass_seconds(num_known + drafts.num_drafts)
        keys = np.maximum(drafts.keys - self._cost.context * drafts.num_drafts, 0)
        guessing = self._cost.guessing_seconds(drafts.num_guessing, drafts.depth)
        added = with_drafts - self._cost.seconds_of(num_known)
        return np.asarray(added + self._cost.next_key * keys + guessing)
