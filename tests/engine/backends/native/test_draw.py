"""Draws by the CPU kernels are those that torch's operators make from the same noise."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from engine.backends.draws import Draws
from engine.backends.native.library import kernels
from engine.backends.native.noise import draw
from engine.backends.noise import gumbel, make_keys, mix_seed
from engine.backends.torch import draws as drawing

pytestmark = pytest.mark.skipif(kernels() is None, reason="no AVX-512 VNNI and BF16, or no C compiler")


def draws_of(seed: int, num_rows: int, temperature: float, top_k: int, top_p: float, min_p: float) -> Draws:
    return Draws(
        keys=make_keys(torch.tensor([mix_seed(row) for row in range(num_rows)]), torch.tensor([seed])),
        temperatures=torch.full((num_rows,), temperature),
        top_k=torch.full((num_rows,), top_k),
        top_p=torch.full((num_rows,), top_p, dtype=torch.float64),
        min_p=torch.full((num_rows,), min_p),
    )


def by_torch(logits: torch.Tensor, draws: Draws) -> torch.Tensor:
    scaled = logits / draws.temperatures.unsqueeze(1)
    noise = gumbel(draws.keys, torch.ones(len(logits)), logits.shape[1])
    return drawing.draw(scaled, noise, drawing.truncate(scaled, draws.top_k, draws.top_p, draws.min_p))


@settings(deadline=None, max_examples=300)
@given(
    seed=st.integers(0, 2**32),
    vocab=st.sampled_from([16, 32, 128, 1024]),
    spread=st.sampled_from([0.0, 0.5, 3.0, 30.0]),
    step=st.sampled_from([None, 0.125, 1.0]),
    temperature=st.sampled_from([0.1, 0.7, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 3, 20, 1000]),
    top_p=st.sampled_from([1e-9, 0.1, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
)
def test_draws_are_torchs(
    seed: int,
    vocab: int,
    spread: float,
    step: float | None,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(7, vocab, generator=generator)
    if step is not None:  # ties
        logits = (logits / step).round() * step
    logits[:, :3] = float("-inf")
    draws = draws_of(seed, 7, temperature, top_k, top_p, min_p)
    found, expected = draw(logits, draws), by_torch(logits, draws)
    assert found is not None
    # A share may lie on a bound up to rounding, and then either is right; but not in two rows of seven.
    assert (found != expected).sum() <= 1


def test_what_is_cut_off_is_never_drawn_and_the_rest_is_as_often_as_probable() -> None:
    rows = 20_000
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 1.5, float("-inf"), -3.0, 0.5] * 2)
    logits[8:] = -1.0
    draws = draws_of(1, rows, 0.8, 5, 0.9, 0.01)
    found = draw(logits.expand(rows, -1).contiguous(), draws)
    assert found is not None
    probs = drawing.truncate(
        logits.unsqueeze(0) / 0.8,
        torch.tensor([5]),
        torch.tensor([0.9], dtype=torch.float64),
        torch.tensor([0.01]),
    )[0].double()
    counts = torch.bincount(found, minlength=16)
    possible = probs > 0
    assert counts[~possible].sum() == 0
    expected = rows * probs[possible] / probs[possible].sum()
    assert float(((counts[possible] - expected) ** 2 / expected).sum()) < 25  # chi-square of 4: p is 5e-5


@pytest.mark.parametrize("value", [float("-inf"), float("nan")])
@pytest.mark.parametrize("cuts", [(0, 1.0, 0.0), (3, 0.5, 0.1)])
def test_a_row_that_is_no_distribution_gives_a_token(value: float, cuts: tuple[int, float, float]) -> None:
    logits = torch.full((2, 32), value)
    logits[1] = torch.randn(32)
    draws = draws_of(2, 2, 1.0, *cuts)
    found = draw(logits, draws)
    assert found is not None and 0 <= found[0] < 32
    assert found[1] == by_torch(logits, draws)[1]  # and leaves its neighbour alone


def test_tied_tokens_share_at_any_temperature() -> None:
    logits = torch.full((2000, 16), -3.0)
    logits[:, 4] = logits[:, 9] = 30.0
    for temperature in (1.0, 1e-3, 1e-6):
        found = draw(logits, draws_of(3, 2000, temperature, 0, 1.0, 0.0))
        assert found is not None and set(found.tolist()) == {4, 9}
        assert 800 < int((found == 4).sum()) < 1200


@pytest.mark.parametrize(
    "logits", [torch.zeros(2, 17), torch.zeros(2, 16, dtype=torch.bfloat16), torch.zeros(16, 32).t()]
)
def test_what_the_kernels_do_not_take_is_left_to_torch(logits: torch.Tensor) -> None:
    assert draw(logits, draws_of(0, len(logits), 1.0, 0, 1.0, 0.0)) is None
