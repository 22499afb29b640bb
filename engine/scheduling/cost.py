"""What a step costs by its number of tokens: measured at start-up, corrected by every step that follows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

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
_TABLE = 4096  # tokens, and requests, whose times are looked up

Curve = tuple[tuple[int, float], ...]  # (count, seconds), rising counts


@dataclass(frozen=True)
class CostModel:
    """Seconds of a pass by its number of tokens, and of asking the heads by the number of requests, as
    measured: for one level of guesses, and for all `levels` of them.

    Between two points time is interpolated, beyond the last it goes on with the slope of the last two. The
    passes were measured over `context` computed positions for each request; `first_key` is what one more of
    them costs a request, `next_key` what it costs each further token of the same request in the pass.
    """

    passes: Curve
    first_level: Curve = ((1, 0.0),)
    all_levels: Curve = ((1, 0.0),)
    levels: int = 1
    context: int = 0
    first_key: float = 0.0
    next_key: float = 0.0

    def base_seconds(self, num_tokens: int, num_requests: int, num_keys: int) -> float:
        """Of a pass without drafts; num_keys: computed positions of all its requests together."""
        keys = max(num_keys - self.context * num_requests, 0)
        return float(self.pass_seconds(np.array([num_tokens]))[0]) + self.first_key * keys

    @cached_property
    def _pass_table(self) -> NDArray[np.float64]:
        return _interpolate(self.passes, np.arange(_TABLE))

    @cached_property
    def _level_tables(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Of the first level, and of each further one."""
        return self._levels_at(np.arange(_TABLE))

    def _levels_at(self, counts: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        first, every = (_interpolate(curve, counts) for curve in (self.first_level, self.all_levels))
        first[counts == 0] = every[counts == 0] = 0.0
        return first, np.maximum(every - first, 0.0) / max(self.levels - 1, 1)

    @property
    def token_seconds(self) -> float:
        """What one more token adds to a large pass."""
        *_, largest = self.passes
        return float(np.diff(self.pass_seconds(np.array([largest[0], largest[0] + 1])))[0])

    def pass_seconds(self, num_tokens: NDArray[np.int64]) -> NDArray[np.float64]:
        if num_tokens[-1] < _TABLE:  # what comes in an order comes in a rising one
            return np.asarray(self._pass_table[num_tokens])
        return _interpolate(self.passes, num_tokens)

    def guessing_seconds(
        self, num_requests: NDArray[np.int64], depth: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """num_requests: that the heads guess for, none at 0; depth: levels that they are asked for, at least
        1."""
        if num_requests[-1] < _TABLE:  # rising, too
            first, further = (table[num_requests] for table in self._level_tables)
        else:
            first, further = self._levels_at(num_requests)
        return np.asarray(first + further * (np.minimum(depth, self.levels) - 1))


def _interpolate(points: Curve, at: NDArray[np.int64]) -> NDArray[np.float64]:
    counts = np.array([count for count, _ in points], dtype=np.float64)
    # More tokens never take less time: where the measurement says so, the smaller count was disturbed.
    seconds = np.minimum.accumulate(np.array([second for _, second in points])[::-1])[::-1]
    values = np.interp(at, counts, seconds)
    if len(points) > 1:
        slope = (seconds[-1] - seconds[-2]) / (counts[-1] - counts[-2])
        values += np.maximum(at - counts[-1], 0) * slope
    return np.asarray(values)


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
