"""How long an engine may take before it counts as hung: for its start, and for a step. Plain numbers, learned
from what starts and steps have taken on this machine."""

from __future__ import annotations

_FIRST_START = 1800.0  # seconds: weights may be large, on a slow disk, and have to be converted
_STARTS, _LEAST_START = 3.0, 60.0  # a later start: times the longest one so far, and seconds at least
_STEPS, _LEAST_STEP, _MOST_STEP = 10.0, 10.0, 30.0  # times the longest step, within so many seconds
_SLOW_STEPS = 4.0  # times the longest finished step, without a bound in seconds: slow is not hung
_FADING = 0.999  # of what is remembered, with each further step: a slow one may have been an accident
_MOST_PATIENCE = 4.0


class Watchdog:
    """Limits in seconds. `step_timeout` is what the user asks for, None to derive it.

    After a limit was exceeded it is doubled. Otherwise a machine that has become slow would never finish a
    step or a start.
    """

    def __init__(self, step_timeout: float | None = None) -> None:
        self._step_timeout = step_timeout
        self._longest_start: float | None = None
        self._start_patience = 1.0
        self._largest_pass = 0.0
        self._longest_step = 0.0
        self._step_patience = 1.0

    @property
    def start_limit(self) -> float:
        """Seconds that the engine may take to load its model."""
        if self._longest_start is None:
            return _FIRST_START
        usual = max(_STARTS * self._longest_start, _LEAST_START)
        return min(usual * self._start_patience, _FIRST_START)

    @property
    def step_limit(self) -> float:
        """Seconds that one step may take."""
        if self._step_timeout is not None:
            return self._step_timeout
        # Finished steps may have had small chunks of prompts; the estimate is of a whole one.
        usual = _MOST_STEP
        if self._largest_pass:
            longest = max(self._longest_step, self._largest_pass)
            usual = min(max(_STEPS * longest, _LEAST_STEP), _MOST_STEP)
        # An estimate may be wrong on a busy machine; a finished step is a fact.
        return max(usual, _SLOW_STEPS * self._longest_step) * self._step_patience

    def started(self, seconds: float, largest_pass: float) -> None:
        """A start succeeded. `largest_pass`: its seconds as the engine estimates them, 0 where not."""
        self._longest_start = max(seconds, self._longest_start or 0.0)
        self._start_patience = 1.0
        self._largest_pass = largest_pass

    def start_overran(self) -> None:
        self._start_patience *= 2

    def stepped(self, seconds: float) -> None:
        self._longest_step = max(seconds, _FADING * self._longest_step)
        self._step_patience = max(1.0, _FADING * self._step_patience)

    def step_overran(self) -> None:
        self._step_patience = min(2 * self._step_patience, _MOST_PATIENCE)
