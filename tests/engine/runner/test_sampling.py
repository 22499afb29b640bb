"""The arithmetic of sampling against naive references, one row and one token at a time."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.runner import sampling

# Tied or well apart: of two logits that differ by one rounding float32 and float64 tell different stories.
logit_rows = st.lists(st.integers(-64, 64).map(lambda eighths: eighths / 8), min_size=1, max_size=20)


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
