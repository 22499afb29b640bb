"""A small Kalman filter: learns from the steps what they are made of. Plain numpy; pacing of prompts uses it
too."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_NOISE = 0.15  # standard deviation of one step's time, as a share of the predicted time
_DRIFT = 0.02  # share of the prior variance that comes back every step: loads change
_LARGEST_SURPRISE = 1.0  # a step that took longer by this share of the prediction counts as this much longer


class Tracker:
    """Coefficients of a sum that makes up a step's seconds, tracked around what they are thought to be at
    first. A coefficient that the load cannot tell from the others stays where it is.

    state: of each coefficient; deviation: how far off it may be at first, as a standard deviation.
    """

    def __init__(self, state: Sequence[float], deviation: Sequence[float]) -> None:
        self.state = np.array(state, dtype=np.float64)
        self._prior = np.array(deviation) ** 2
        self._variance = np.diag(self._prior)

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
