"""The index finds what a search through the whole text finds."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.batch import NO_CHAIN, Chain
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
        assert list(index.guess(known, limit).token_ids) == search(known, limit)


def test_the_longest_match_wins_over_a_later_shorter_one() -> None:
    index = NgramIndex()
    tokens = [1, 2, 3, 4, 50, 9, 3, 4, 60, 1, 2, 3, 4]
    index.extend(tokens)
    assert index.guess(tokens, 2).token_ids == [50, 9]


def test_a_pattern_is_continued_past_the_end() -> None:
    index = NgramIndex()
    tokens = [7, 5, 6, 5, 6, 5]
    index.extend(tokens)
    assert index.guess(tokens, 5).token_ids == [6, 5, 6, 5, 6]


def test_new_words_have_no_continuation() -> None:
    index = NgramIndex()
    index.extend([1, 2, 3, 2])
    assert index.guess([1, 2, 3, 2], 4) is NO_CHAIN
    index.extend([])
    assert NgramIndex().guess([], 4) is NO_CHAIN


def test_longer_agreement_is_surer_and_every_further_guess_less_sure() -> None:
    short = guess([5, 6, 7, 8, 50, 51, 52, 60, 3, 61, 7, 8], 3)
    longer = guess([5, 6, 7, 8, 50, 51, 52, 60, 3, 61, 5, 6, 7, 8], 3)
    assert short.token_ids == longer.token_ids == [50, 51, 52]
    assert (short.match, longer.match) == (2, 4)
    assert all(a > b > 0 for a, b in itertools.pairwise(short.gains))
    assert all(a > b for a, b in zip(longer.gains, short.gains, strict=True))


def guess(tokens: list[int], limit: int) -> Chain:
    index = NgramIndex()
    index.extend(tokens)
    return index.guess(tokens, limit)


def test_a_request_s_own_record_moves_what_is_expected() -> None:
    index = NgramIndex()
    tokens = [1, 2, 3, 9, 1, 2]
    index.extend(tokens)
    chain = index.guess(tokens, 2)
    for _ in range(30):
        index.observe(chain, [chain.token_ids[0], 77, 5])
    after = index.guess(tokens, 2)
    assert after.gains[0] > 0.9 > chain.gains[0]
    # Right once, then wrong: the second guess is only doubted further.
    assert after.gains[1] / after.gains[0] < 0.2


def test_an_answer_that_ends_before_the_chain_says_nothing_of_its_rest() -> None:
    index = NgramIndex()
    tokens = [1, 2, 3, 9, 1, 2]
    index.extend(tokens)
    chain = index.guess(tokens, 3)
    index.observe(chain, [])
    assert index.guess(tokens, 3) == chain
