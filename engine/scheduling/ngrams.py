"""Prompt lookup: what followed the last few tokens when they occurred before in the same request.

Plain Python. As in prompt lookup decoding (Saxena, 2023), but every n-gram is indexed once, when its next
token arrives, so that a lookup never scans the text.
"""

from __future__ import annotations

from collections.abc import Sequence

MIN_LENGTH, MAX_LENGTH = 2, 4  # of the n-grams looked up; a longer match is tried first


class NgramIndex:
    """The n-grams of one growing sequence of tokens, each with the place after its latest occurrence."""

    def __init__(self) -> None:
        self._num_indexed = 0  # tokens whose preceding n-grams are known
        self._next_place: dict[tuple[int, ...], int] = {}

    def extend(self, tokens: Sequence[int]) -> None:
        """Take in the tokens that came since the last call; `tokens` is the whole sequence."""
        for place in range(max(self._num_indexed, MIN_LENGTH), len(tokens)):
            for length in range(MIN_LENGTH, min(MAX_LENGTH, place) + 1):
                self._next_place[tuple(tokens[place - length : place])] = place
        self._num_indexed = len(tokens)

    def continuation(self, tokens: Sequence[int], limit: int) -> list[int]:
        """Up to `limit` guesses at what comes after `tokens`, the sequence last given to `extend`.

        Empty where its last two tokens are new. A match that reaches the end goes on with its own guesses, so
        that a repeating pattern is continued for as long as asked.
        """
        for length in range(min(MAX_LENGTH, len(tokens)), MIN_LENGTH - 1, -1):
            place = self._next_place.get(tuple(tokens[len(tokens) - length :]))
            if place is not None:
                known = list(tokens[place : place + limit])
                period = len(tokens) - place
                while len(known) < limit:
                    known.append(known[len(known) - period])
                return known
        return []
