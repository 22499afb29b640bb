"""What passes cost, as plain data: the runner measures it at start-up, speculation and pacing read it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

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
        """Seconds of a pass without drafts. num_keys: computed positions of all its requests together."""
        keys = max(num_keys - self.context * num_requests, 0)
        return self.seconds_of(num_tokens) + self.first_key * keys

    def seconds_of(self, num_tokens: int) -> float:
        """Seconds of one pass, over `context` computed positions for each request."""
        if num_tokens < _TABLE:
            return float(self._pass_table[num_tokens])
        return float(self.pass_seconds(np.array([num_tokens]))[0])

    @cached_property
    def _pass_table(self) -> NDArray[np.float64]:
        return _interpolate(self.passes, np.arange(_TABLE))

    @cached_property
    def _level_tables(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Seconds of the first level, and of each further one, by the number of requests."""
        return self._levels_at(np.arange(_TABLE))

    def _levels_at(self, counts: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        first, every = (_interpolate(curve, counts) for curve in (self.first_level, self.all_levels))
        first[counts == 0] = every[counts == 0] = 0.0
        return first, np.maximum(every - first, 0.0) / max(self.levels - 1, 1)

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
