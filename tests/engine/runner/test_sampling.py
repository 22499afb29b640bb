"""The arithmetic of sampling against naive references, one row and one token at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from engine.backends.noise import gumbel, make_keys, mix_seed
from engine.runner import sampling

# Tied or well apart: of two logits that differ by one rounding float32 and float64 tell different stories.
logit_rows = st.lists(st.integers(-64, 64).map(lambda eighths: eighths / 8), min_size=1, max_size=20)


def truncate_one(logits: list[float], top_k: int, top_p: float, min_p: float) -> list[float]:
    return sampling.truncate(
        torch.tensor([logits]), torch.tensor([top_k]), torch.tensor([top_p]), torch.tensor([min_p])
    )[0].tolist()


@settings(max_examples=300, deadline=None)
@given(
    logits=logit_rows,
    top_k=st.integers(0, 25),
    top_p=st.sampled_from([0.1, 0.5, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.3]),
)
def test_truncation_keeps_what_a_plain_reading_keeps(
    logits: list[float], top_k: int, top_p: float, min_p: float
) -> None:
    kept = truncate_one(logits, top_k, top_p, min_p)
    probs = np.exp(np.array(logits, dtype=np.float64) - max(logits))
    kth = sorted(logits)[-min(top_k or len(logits), len(logits))]
    probs = np.where(np.array(logits) >= kth, probs, 0.0)
    probs /= probs.sum()
    best = np.sort(probs)[::-1]
    mass = np.cumsum(best)
    if np.abs(mass - top_p).min() < 1e-5 or np.abs(probs - min_p * probs.max()).min() < 1e-6 < min_p:
        return  # on the edge float32 may round to the other side
    floor = best[int((mass < top_p).sum())] if top_p < 1.0 else 0.0
    expected = np.where((probs >= floor * (1 - 1e-6)) & (probs >= min_p * probs.max()), probs, 0.0)
    assert kept == pytest.approx(expected.tolist(), abs=1e-5)
    assert [value > 0 for value in kept] == [value > 0 for value in expected]


def test_rows_of_one_call_do_not_touch_each_other() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 1000, generator=generator) * 2
    top_k = torch.tensor([0, 5, 0, 40, 0, 2000])
    top_p = torch.tensor([1.0, 1.0, 0.9, 0.5, 0.999, 0.2])
    min_p = torch.tensor([0.0, 0.1, 0.0, 0.0, 0.02, 0.0])
    together = sampling.truncate(logits, top_k, top_p, min_p)
    for row in range(6):
        alone = sampling.truncate(
            logits[row : row + 1], top_k[row : row + 1], top_p[row : row + 1], min_p[row : row + 1]
        )
        assert torch.equal(together[row], alone[0])


def test_nucleus_wider_than_the_first_candidates_is_still_exact() -> None:
    probs = truncate_one([0.0] * 300 + [-20.0] * 300, 0, 0.99, 0.0)
    assert [p > 0 for p in probs] == [True] * 300 + [False] * 300


def test_tokens_tied_with_the_last_kept_one_are_kept() -> None:
    assert [p > 0 for p in truncate_one([1.0, 3.0, 2.0, 2.0], 2, 1.0, 0.0)] == [False, True, True, True]


@pytest.mark.parametrize("vocab", [1, 63, 64, 640, 1000])
def test_argmax_is_the_first_of_the_largest(vocab: int) -> None:
    generator = torch.Generator().manual_seed(vocab)
    few = torch.randint(0, 4, (200, vocab), generator=generator).float()
    for logits in (few, few.bfloat16(), few.masked_fill(few < 3, float("-inf"))):
        assert sampling.argmax(logits).tolist() == [row.index(max(row)) for row in logits.tolist()]


@settings(max_examples=200, deadline=None)
@given(
    logits=logit_rows,
    repetition=st.sampled_from([0.5, 1.0, 1.3]),
    frequency=st.sampled_from([-0.5, 0.0, 0.7]),
    presence=st.sampled_from([-1.0, 0.0, 0.4]),
    data=st.data(),
)
def test_penalties_equal_a_plain_reading(
    logits: list[float], repetition: float, frequency: float, presence: float, data: st.DataObject
) -> None:
    count = len(logits)
    counts = data.draw(st.lists(st.integers(0, 3), min_size=count, max_size=count))
    prompt = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    expected = []
    for value, times, asked in zip(logits, counts, prompt, strict=True):
        if times or asked:
            value = value / repetition if value > 0 else value * repetition
        expected.append(value - frequency * times - (presence if times else 0.0))
    seen = torch.tensor([prompt]) | (torch.tensor([counts]) > 0)
    got = sampling.apply_penalties(
        torch.tensor([logits]),
        torch.tensor([counts]).float(),
        seen,
        *(torch.tensor([[value]]) for value in (repetition, frequency, presence)),
    )
    assert got[0].tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("masked", [False, True])
def test_draws_are_as_frequent_as_probable(masked: bool) -> None:
    draws = 20_000
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 1.5, float("-inf"), -3.0, 0.5]).expand(draws, -1)
    probs = logits.softmax(dim=1)
    if masked:
        probs = torch.where(probs >= 0.1, probs, 0.0)
    seeds = torch.tensor([mix_seed(seed) for seed in range(draws)])
    noise = gumbel(make_keys(seeds, torch.full((draws,), 5)), torch.ones(draws), 8)
    counts = torch.bincount(sampling.draw(logits, noise, probs if masked else None), minlength=8)
    expected = draws * probs[0].double() / probs[0].double().sum()
    assert counts[expected == 0].sum() == 0
    possible = expected > 0
    assert stats.chisquare(counts[possible], expected[possible]).pvalue > 1e-3


@pytest.mark.parametrize("value", [float("-inf"), float("nan")])
def test_a_row_that_is_no_distribution_gives_a_token(value: float) -> None:
    logits = torch.full((2, 32), value)
    for probs in (None, logits.softmax(dim=1)):
        drawn = sampling.draw(logits, torch.zeros(2, 32), probs)
        assert drawn.min() >= 0 and drawn.max() < 32


@settings(deadline=None)
@given(logit_rows, st.floats(0.01, 1.0), st.floats(0.01, 1.0))
def test_typical_threshold_is_epsilon_or_what_the_entropy_allows(
    logits: list[float], epsilon: float, delta: float
) -> None:
    probs = torch.tensor([logits], dtype=torch.float64).softmax(dim=1)
    entropy = -sum(p * math.log(p) for p in probs[0].tolist() if p > 0)
    [threshold] = sampling.typical_threshold(probs, torch.tensor([epsilon]), torch.tensor([delta])).tolist()
    assert threshold == pytest.approx(min(epsilon, delta * math.exp(-entropy)), rel=1e-6)


def test_typical_threshold_with_impossible_tokens() -> None:
    probs = torch.tensor([[0.5, 0.5, 0.0]])
    [threshold] = sampling.typical_threshold(probs, torch.tensor([0.9]), torch.tensor([0.3])).tolist()
    assert threshold == pytest.approx(0.15)
