"""How much of prompts a step reads, so that running answers go on coming and short prompts are not held by
long ones. Plain Python and numpy, no torch.

Only time depends on it: what a request answers is the same however its prompt is cut.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import Protocol

from engine.batch import Batch
from engine.costs import CostModel
from engine.speculation.tracker import Tracker

# How long a step with prompts should take, as a multiple of a usual step without. The first holds where
# requests wait for their next token. The second holds where prompts are read alone: each step reads the
# weights again.
_SLOWDOWN, _SLOWDOWN_ALONE = 2.2, 3.2
# Time for prompts in any case, as a multiple of what comes with every step: what is known of steps without
# prompts may be old.
_LEAST, _LEAST_ALONE = 0.6, 1.8
_OF_LONGEST = 0.85  # of a bound that was asked for: steps vary
# Shares of a step without prompts in the averages of the machine's speed, and of what drafts add.
_SPEED, _DRAFTING = 0.2, 0.05
_LARGEST_SURPRISE = 0.5  # of a logarithm: what was interrupted counts for no more
# Price of a pass with prompts and of the keys that its tokens look at, as multiples of the cost model's: at
# first, and how far off they may be.
_PRICES, _DOUBTS, _LEAST_PRICE = (1.3, 1.0), (0.4, 1.0), 0.1


class Pacing(Protocol):
    def spare_seconds(self, num_decoding: int, num_keys: int) -> float:
        """How long a step may last beyond the time that `num_decoding` requests take for one token each, over
        `num_keys` computed positions of all of them together. It may be negative."""
        ...

    def affordable(self, seconds: float, num_computed: int, num_beside: int, most: int) -> int:
        """Tokens of one request, 0 to `most`, that can be computed in this time, behind `num_computed`
        computed ones, in a pass that holds `num_beside` other tokens."""
        ...

    def added_seconds(self, num_tokens: int, num_computed: int, num_beside: int) -> float:
        """What so many tokens of one request add to a pass."""
        ...

    def observe(self, batch: Batch, seconds: float) -> None:
        """Learn from how long a step took."""
        ...


class Unpaced:
    """As many prompt tokens as the token budget holds."""

    def spare_seconds(self, num_decoding: int, num_keys: int) -> float:
        return math.inf

    def affordable(self, seconds: float, num_computed: int, num_beside: int, most: int) -> int:
        return most

    def added_seconds(self, num_tokens: int, num_computed: int, num_beside: int) -> float:
        return 0.0

    def observe(self, batch: Batch, seconds: float) -> None:
        pass


class TimedPacing:
    """As many prompt tokens as keep a step's time within bounds.

    The time of a step without prompts is what the cost model says of it times e^speed. A step with prompts
    takes `pass price * pass + key price * keys` of what the cost model says, times e^speed. So a machine that
    is busy makes both kinds of steps dearer, and prompts have prices of their own: their passes are bound by
    computing, others by memory. `drafting` is how much longer drafts make steps without prompts, as a
    logarithm. All of them follow what steps took.

    longest: seconds of a step with prompts; by default 2.2 times a usual step without.
    """

    def __init__(self, cost: CostModel, longest: float | None = None) -> None:
        self._cost, self._longest = cost, longest
        self._speed = self._drafting = 0.0
        self._prices = Tracker(_PRICES, _DOUBTS)
        self._set_prices()

    def spare_seconds(self, num_decoding: int, num_keys: int) -> float:
        roots = self._cost.base_seconds(num_decoding, num_decoding, num_keys)  # of one token where nobody is
        with_prompts = self._seconds(roots, 0.0)
        if self._longest is not None:
            return _OF_LONGEST * self._longest - with_prompts
        usual = math.exp(self._speed + self._drafting) * roots
        slowdown, least = (_SLOWDOWN, _LEAST) if num_decoding else (_SLOWDOWN_ALONE, _LEAST_ALONE)
        return max(slowdown * usual - with_prompts, least * with_prompts)

    def affordable(self, seconds: float, num_computed: int, num_beside: int, most: int) -> int:
        def added(num_tokens: int) -> float:
            return self.added_seconds(num_tokens, num_computed, num_beside)

        return max(bisect_right(range(most + 1), seconds, key=added) - 1, 0)

    def added_seconds(self, num_tokens: int, num_computed: int, num_beside: int) -> float:
        added = self._cost.seconds_of(num_beside + num_tokens) - self._cost.seconds_of(num_beside)
        return self._seconds(added, num_tokens * (num_computed + num_tokens / 2))

    def observe(self, batch: Batch, seconds: float) -> None:
        decoding = [s.num_computed for s in batch.scheduled if s.num_tokens == 1]
        reading = [s for s in batch.scheduled if s.num_tokens > 1]
        roots = self._cost.base_seconds(len(decoding), len(decoding), sum(decoding))
        whole = roots + self._cost.seconds_of(batch.num_tokens) - self._cost.seconds_of(len(decoding))
        keys = float(sum(s.num_drafts * s.num_computed for s in batch.scheduled))
        if reading:
            keys += sum(s.num_tokens * (s.num_computed + s.num_tokens / 2) for s in reading)
            row = (whole, self._cost.next_key * keys)
            self._prices.observe(row, seconds / math.exp(self._speed), least=whole)
        elif min(seconds, roots) > 0.0:
            whole += self._cost.next_key * keys
            surprise = math.log(seconds / whole) - self._speed
            self._speed += _SPEED * min(max(surprise, -_LARGEST_SURPRISE), _LARGEST_SURPRISE)
            self._drafting += _DRAFTING * (math.log(whole / roots) - self._drafting)
        self._set_prices()

    def _seconds(self, pass_seconds: float, keys: float) -> float:
        """Of something in a step with prompts. pass_seconds: by the cost model."""
        return self._of_pass * pass_seconds + self._of_keys * keys

    def _set_prices(self) -> None:
        busy = math.exp(self._speed)
        of_pass, of_keys = (max(float(price), _LEAST_PRICE) for price in self._prices.state)
        self._of_pass, self._of_keys = busy * of_pass, busy * of_keys * self._cost.next_key
