"""Draws by torch's operators against naive references, one row and one token at a time."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from engine.backends.noise import gumbel, make_keys, mix_seed
from engine.backends.torch import draws as drawing
from tests.engine.tiny import tiny_backend

# Tied or well apart: of two logits that differ by one rounding float32 and float64 tell different stories.
logit_rows = st.lists(st.integers(-64, 64).map(lambda eighths: eighths / 8), min_size=1, max_size=20)


def truncate_one(logits: list[float], top_k: int, top_p: float, min_p: float) -> list[float]:
    return drawing.truncate(
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
    together = drawing.truncate(logits, top_k, top_p, min_p)
    for row in range(6):
        alone = drawing.truncate(
            logits[row : row + 1], top_k[row : row + 1], top_p[row : row + 1], min_p[row : row + 1]
        )
        assert torch.equal(together[row], alone[0])


def test_nucleus_wider_than_the_first_candidates_is_still_exact() -> None:
    probs = truncate_one([0.0] * 300 + [-20.0] * 300, 0, 0.99, 0.0)
    assert [p > 0 for p in probs] == [True] * 300 + [False] * 300


def test_tokens_tied_with_the_last_kept_one_are_kept() -> None:
    assert [p > 0 for p in truncate_one([1.0, 3.0, 2.0, 2.0], 2, 1.0, 0.0)] == [False, True, True, True]


@pytest.mark.parametrize("vocab", [1, 63, 64, 640, 1000])
@pytest.mark.parametrize("argmax", [drawing.argmax, tiny_backend().argmax], ids=["torch", "chosen"])
def test_argmax_is_the_first_of_the_largest(argmax: Callable[[Tensor], Tensor], vocab: int) -> None:
    generator = torch.Generator().manual_seed(vocab)
    few = torch.randint(0, 4, (200, vocab), generator=generator).float()
    for logits in (few, few.bfloat16(), few.masked_fill(few < 3, float("-inf"))):
        assert argmax(logits).tolist() == [row.index(max(row)) for row in logits.tolist()]


@pytest.mark.parametrize("masked", [False, True])
def test_draws_are_as_frequent_as_probable(masked: bool) -> None:
    draws = 20_000
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 1.5, float("-inf"), -3.0, 0.5]).expand(draws, -1)
    probs = logits.softmax(dim=1)
    if masked:
        probs = torch.where(probs >= 0.1, probs, 0.0)
    seeds = torch.tensor([mix_seed(seed) for seed in range(draws)])
    noise = gumbel(make_keys(seeds, torch.full((draws,), 5)), torch.ones(draws), 8)
    counts = torch.bincount(drawing.draw(logits, noise, probs if masked else None), minlength=8)
    expected = draws * probs[0].double() / probs[0].double().sum()
    assert counts[expected == 0].sum() == 0
    possible = expected > 0
    assert stats.chisquare(counts[possible], expected[possible]).pvalue > 1e-3


@pytest.mark.parametrize("value", [float("-inf"), float("nan")])
def test_a_row_that_is_no_distribution_gives_a_token(value: float) -> None:
    logits = torch.full((2, 32), value)
    for probs in (None, logits.softmax(dim=1)):
        drawn = drawing.draw(logits, torch.zeros(2, 32), probs)
        assert drawn.min() >= 0 and drawn.max() < 32
