"""Prompt lookup: what followed the last few tokens when they occurred before in the same request.

Plain Python. As in prompt lookup decoding (Saxena, 2023), but every n-gram is indexed once, when its next
token arrives, so that a lookup never scans the text, and a guess says how sure it is: the longer the text
before it agrees with the text before the earlier place, the likelier it is to go on as it did there.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from engine.batch import NO_CHAIN, Chain

MIN_LENGTH, MAX_LENGTH = 2, 4  # of the n-grams looked up; a longer match is tried first
_LONGEST_MATCH = 24  # beyond, more agreement says no more
# How often the next token was right after a match of this length, over 700 greedy answers of
# SmolLM2-135M-Instruct with their prompts, rounded down; other models and texts are learned by request.
_LENGTHS = (2, 3, 4, 5, 7, 11, 17)
_RATES = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9)
_PRIOR_GUESSES = 4.0  # how many guesses of a request these rates weigh
_LEAST_GAIN = 0.01  # a guess that is less likely is worth no draft token anywhere
# Place in _RATES by length of the match; whatever is longer has the last one.
_BUCKETS = tuple(bisect_right(_LENGTHS, length) - 1 for length in range(_LENGTHS[-1] + 1))


class NgramIndex:
    """The n-grams of one growing sequence of tokens, each with the place after its latest occurrence."""

    def __init__(self) -> None:
        self._num_indexed = 0  # tokens whose preceding n-grams are known
        self._next_place: dict[tuple[int, ...], int] = {}
        self._right = [rate * _PRIOR_GUESSES for rate in _RATES]
        self._guessed = [_PRIOR_GUESSES] * len(_RATES)

    def extend(self, tokens: Sequence[int]) -> None:
        """Take in the tokens that came since the last call; `tokens` is the whole sequence."""
        for place in range(max(self._num_indexed, MIN_LENGTH), len(tokens)):
            for length in range(MIN_LENGTH, min(MAX_LENGTH, place) + 1):
                self._next_place[tuple(tokens[place - length : place])] = place
        self._num_indexed = len(tokens)

    def guess(self, tokens: Sequence[int], limit: int) -> Chain:
        """Up to `limit` guesses at what comes after `tokens`, the sequence last given to `extend`.

        NO_CHAIN where its last two tokens are new. It ends where a guess is hardly likely any more. A match
        that reaches the end goes on with its own guesses, so that a repeating pattern is continued.
        """
        place = self._find(tokens)
        if place is None or limit <= 0:
            return NO_CHAIN
        match = MIN_LENGTH
        longest = min(_LONGEST_MATCH, place)
        while match < longest and tokens[place - 1 - match] == tokens[-1 - match]:
            match += 1
        rates = [right / guessed for right, guessed in zip(self._right, self._guessed, strict=True)]
        gains, sure = [], 1.0
        for length in range(match, match + limit):
            sure *= rates[_bucket(length)]
            if sure < _LEAST_GAIN:
                break
            gains.append(sure)
        known = list(tokens[place : place + len(gains)])
        period = len(tokens) - place
        while len(known) < len(gains):
            known.append(known[len(known) - period])
        return Chain(known, gains, match)

    def observe(self, chain: Chain, committed: Sequence[int]) -> None:
        """Learn from what came in the place of a chain."""
        for place, (guess, token) in enumerate(zip(chain.token_ids, committed, strict=False)):
            bucket = _bucket(chain.match + place)
            self._guessed[bucket] += 1
            if guess != token:
                return
            self._right[bucket] += 1

    def _find(self, tokens: Sequence[int]) -> int | None:
        for length in range(min(MAX_LENGTH, len(tokens)), MIN_LENGTH - 1, -1):
            place = self._next_place.get(tuple(tokens[len(tokens) - length :]))
            if place is not None:
                return place
        return None


def _bucket(length: int) -> int:
    return _BUCKETS[length] if length < len(_BUCKETS) else _BUCKETS[-1]
