"""Learns from the steps how this machine and load differ from the start-up measurement (`engine.costs`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# The correction's beliefs as standard deviations: before anything was seen, and of one step's time.
_PRIOR = (0.02, 0.5, 0.5)  # seconds, factor, factor
# What drafts are thought to cost at first, of what was measured at start-up: that they are cheaper is found
# out where they are made, and that they are dearer does no harm meanwhile.
_CAUTION = 1.15
_NOISE = 0.15  # share of the predicted time
_DRIFT = 0.02  # share of the prior variance that comes back every step: loads change
_LARGEST_SURPRISE = 1.0  # a step that took longer by this share of the prediction counts as this much longer


class Tracker:
    """Coefficients of a sum that makes up a step's seconds, tracked by a Kalman filter around what they are
    thought to be at first: what a load does not tell apart stays there.

    state: of each coefficient; deviation: how far off it may be, as a standard deviation.
    """

    def __init__(self, state: Sequence[float], deviation: Sequence[float]) -> None:
        self.state = np.array(state, dtype=np.float64)
        self._prior = np.array(deviation) ** 2
        self._variance = np.diag(self._prior)

    @property
    def deviation(self) -> NDArray[np.float64]:
        """How far off each coefficient may be at present."""
        return np.asarray(np.sqrt(np.diag(self._variance)))

    def observe(self, row: Sequence[float], seconds: float, least: float) -> None:
        """Learn from one step: what the coefficients are multiplied by, the time it took, and the least that
        could be expected."""
        terms = np.array(row)
        predicted = float(terms @ self.state)
        noise = (_NOISE * max(predicted, least, 1e-9)) ** 2
        surprise = min(seconds - predicted, _LARGEST_SURPRISE * max(predicted, least))
        spread = self._variance @ terms
        gain = spread / (terms @ spread + noise)
        self.state = self.state + gain * surprise
        self._variance = self._variance - np.outer(gain, spread)
        self._variance += np.diag(np.minimum(_DRIFT * self._prior, self._prior - np.diag(self._variance)))


class CostCorrection:
    """How this machine and load differ from the start-up measurement, learned from the steps themselves.

    A step is taken to last `constant + base_factor * base + draft_factor * drafts`, base and drafts being
    what the cost model says of its known tokens and of what draft tokens add. Longer contexts, more requests
    for the same tokens or a busy machine make one or the other dearer: tracked from (0, 1, 1.15).
    """

    def __init__(self) -> None:
        self._tracker = Tracker((0.0, 1.0, _CAUTION), _PRIOR)

    def base_seconds(self, base: float) -> float:
        """base: modelled seconds of the known tokens."""
        constant, factor, _ = self._tracker.state
        return max(float(constant + factor * base), 0.2 * base, 1e-9)

    def draft_seconds(self, drafts: NDArray[np.float64]) -> NDArray[np.float64]:
        """drafts: modelled seconds that draft tokens add to a pass."""
        return max(float(self._tracker.state[2]), 0.2) * drafts

    def observe(self, base: float, drafts: float, seconds: float) -> None:
        """Learn from one step, given the model's two terms and the time it took."""
        self._tracker.observe((1.0, base, drafts), seconds, least=base)
