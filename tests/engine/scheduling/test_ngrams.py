"""The index finds what a search through the whole text finds."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.scheduling.ngrams import MAX_LENGTH, MIN_LENGTH, NgramIndex


def search(tokens: list[int], limit: int) -> list[int]:
    """The latest earlier occurrence of the longest suffix, token by token past its own end."""
    for length in range(MAX_LENGTH, MIN_LENGTH - 1, -1):
        if length > len(tokens):
            continue
        suffix = tokens[-length:]
        for start in range(len(tokens) - length - 1, -1, -1):
            if tokens[start : start + length] == suffix:
                text = list(tokens)
                for step in range(limit):
                    text.append(text[start + length + step])
                return text[len(tokens) :]
    return []


@settings(max_examples=300, deadline=None)
@given(
    tokens=st.lists(st.integers(0, 3), max_size=60),
    cuts=st.lists(st.integers(0, 60), max_size=6),
    limit=st.integers(1, 12),
)
def test_lookup_equals_a_search_however_the_text_came(tokens: list[int], cuts: list[int], limit: int) -> None:
    index = NgramIndex()
    for cut in sorted({min(cut, len(tokens)) for cut in cuts} | {len(tokens)}):
        known = tokens[:cut]
        index.extend(known)
        assert index.continuation(known, limit) == search(known, limit)


def test_the_longest_match_wins_over_a_later_shorter_one() -> None:
    index = NgramIndex()
    tokens = [1, 2, 3, 4, 50, 9, 3, 4, 60, 1, 2, 3, 4]
    index.extend(tokens)
    assert index.continuation(tokens, 2) == [50, 9]


def test_a_pattern_is_continued_past_the_end() -> None:
    index = NgramIndex()
    tokens = [7, 5, 6, 5, 6, 5]
    index.extend(tokens)
    assert index.continuation(tokens, 5) == [6, 5, 6, 5, 6]


def test_new_words_have_no_continuation() -> None:
    index = NgramIndex()
    index.extend([1, 2, 3, 2])
    assert index.continuation([1, 2, 3, 2], 4) == []
    index.extend([])
    assert NgramIndex().continuation([], 4) == []
