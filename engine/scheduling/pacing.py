"""How much of prompts a step reads, so that running answers go on coming and short prompts are not held by
long ones. Plain Python and numpy, no torch.

Only time depends on it: what a request answers is the same however its prompt is cut.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from engine.costs import CostModel
from engine.scheduling.cost import Tracker

# How long a step with prompt chunks may last, as a multiple of what running requests take without: where some
# wait for their next token, and where nobody does. Then it is as long as reading weights anew for every chunk
# takes little of it.
_SLOWDOWN, _SLOWDOWN_ALONE = 2.5, 4.0


class Pacing(Protocol):
    def allowed_seconds(self, num_decoding: int, num_keys: int) -> float:
        """How much longer prompts may make a step in which so many requests decode, over so many computed
        positions."""
        ...

    def affordable(self, seconds: float, context: int) -> float:
        """Prompt tokens that can be read in this time behind `context` computed ones."""
        ...

    def chunk_seconds(self, num_tokens: int, context: int) -> float:
        """What reading so many prompt tokens adds to a step."""
        ...

    def observe(
        self, num_decoding: int, num_keys: int, chunks: Sequence[tuple[int, int]], seconds: float
    ) -> None:
        """Learn from a step. chunks: tokens and context of each."""
        ...


class Unpaced:
    """As many prompt tokens as the token budget holds."""

    def allowed_seconds(self, num_decoding: int, num_keys: int) -> float:
        return math.inf

    def affordable(self, seconds: float, context: int) -> float:
        return math.inf

    def chunk_seconds(self, num_tokens: int, context: int) -> float:
        return 0.0

    def observe(
        self, num_decoding: int, num_keys: int, chunks: Sequence[tuple[int, int]], seconds: float
    ) -> None:
        pass


class TimedPacing:
    """As many as keep a step's time within bounds.

    A step is taken to last `factor * base + fixed + token * tokens + key * keys`: base is what the cost model
    says of its decoding requests, the rest comes with prompt chunks, and keys are the positions that each of
    their tokens looks at. All four coefficients are learned from steps, those of the start-up measurement
    being where they begin.

    longest: seconds of a step with prompts; by default 2.5 times what it takes without.
    """

    def __init__(self, cost: CostModel, longest: float | None = None) -> None:
        self._cost, self._longest = cost, longest
        one = cost.base_seconds(1, 1, 0)
        self._least_token = 0.1 * max(cost.token_seconds, one / 1000)
        token = max(cost.token_seconds, one / 100)
        key = cost.next_key or token / 1000
        self._tracker = Tracker((1.0, 0.0, token, key), (0.5, one, token, key))

    def allowed_seconds(self, num_decoding: int, num_keys: int) -> float:
        factor, fixed, *_ = self._tracker.state
        usual = max(float(factor), 0.2) * self._base(num_decoding, num_keys)
        fixed = float(fixed)
        if self._longest is not None:
            allowed = self._longest - usual - fixed
        elif num_decoding:
            allowed = (_SLOWDOWN - 1.0) * usual - fixed
        else:
            allowed = _SLOWDOWN_ALONE * (usual + max(fixed, 0.0))
        # A bound that nothing fits into would make prompts as slow as what comes with every chunk.
        return max(allowed, fixed, 0.0)

    def affordable(self, seconds: float, context: int) -> float:
        token, key = self._prices
        linear, seconds = token + key * context, max(seconds, 0.0)
        return 2.0 * seconds / (linear + math.sqrt(linear * linear + 2.0 * key * seconds))

    def chunk_seconds(self, num_tokens: int, context: int) -> float:
        token, key = self._prices
        return token * num_tokens + key * _keys(num_tokens, context)

    def observe(
        self, num_decoding: int, num_keys: int, chunks: Sequence[tuple[int, int]], seconds: float
    ) -> None:
        base = self._base(num_decoding, num_keys)
        tokens, keys = sum(n for n, _ in chunks), sum(_keys(*chunk) for chunk in chunks)
        self._tracker.observe((base, float(bool(chunks)), tokens, keys), seconds, least=base)

    def _base(self, num_decoding: int, num_keys: int) -> float:
        # A chunk alone is told from one beside a single token by nothing that matters.
        return self._cost.base_seconds(max(num_decoding, 1), max(num_decoding, 1), num_keys)

    @property
    def _prices(self) -> tuple[float, float]:
        """Of a token and a key: as dear as they may well be, since a machine may have become slower since the
        last prompt."""
        _, _, token, key = self._tracker.state + self._tracker.deviation
        return max(float(token), self._least_token), max(float(key), 0.0)


def _keys(num_tokens: int, context: int) -> float:
    return num_tokens * (context + num_tokens / 2)
