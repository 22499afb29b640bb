"""The noise of draws: Gumbel's, the same however it is computed, and known to drafters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from scipy import stats
from torch import Tensor

from engine.backends import noise
from engine.backends.native import noise as native
from engine.backends.native.library import kernels
from engine.backends.noise import Noise, make_keys, mix_seed
from engine.batch import RequestState
from engine.runner.sampling_table import SamplingTable
from tests.engine.helpers import params
from tests.engine.tiny import CPU

ONE = torch.ones(1)


@pytest.fixture(params=["kernels", "torch"])
def gumbel(request: pytest.FixtureRequest) -> Callable[..., Tensor]:
    """How noise is computed."""
    if request.param == "torch":
        return noise.gumbel
    if kernels() is None:
        pytest.skip("no AVX-512 VNNI and BF16, or no C compiler")
    return native.gumbel


def keys_of(seeds: Sequence[int], positions: Sequence[int]) -> Tensor:
    """One key per pair; one of either is paired with all of the others."""
    return make_keys(torch.tensor([mix_seed(seed) for seed in seeds]), torch.tensor(positions))


def splitmix(x: int) -> int:
    """One output of SplitMix64, in Python's own integers."""
    mask = 2**64 - 1
    x = (x + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


@given(st.integers(0, 2**64 - 1), st.integers(0, 100_000))
def test_key_is_a_function_of_seed_and_position(seed: int, position: int) -> None:
    [key] = keys_of([seed], [position]).tolist()
    assert key % 2**64 == splitmix((splitmix(seed) + position * 0x9E3779B97F4A7C15) % 2**64)


@pytest.mark.parametrize("by", ["token", "position", "seed"])
def test_noise_is_gumbel_and_independent_of_its_neighbours(by: str, gumbel: Callable[..., Tensor]) -> None:
    count, running = 20_000, range(20_000)
    if by == "token":
        values = gumbel(keys_of([5], [12]), ONE, count)[0]
    else:
        keys = keys_of(running, [12]) if by == "seed" else keys_of([5], running)
        tokens = torch.tensor([31_000])
        values = gumbel(keys, torch.ones(count), 1, tokens)[:, 0]
    values = values.double().numpy()
    assert stats.kstest(values, "gumbel_r").pvalue > 1e-3
    for distance in (1, 2, 16, 64):
        assert abs(np.corrcoef(values[:-distance], values[distance:])[0, 1]) < 0.03


def test_the_largest_are_as_large_as_chance_has_them(gumbel: Callable[..., Tensor]) -> None:
    # Whether rare tokens get their share depends on the far end: of so many values, 1 in e ** 10 exceeds 10.
    values = gumbel(keys_of(range(400), [3]), torch.ones(400), 49_152)
    assert bool(values.isfinite().all())
    for bound in (10.0, 13.0, 15.0):
        expected = values.numel() * -np.expm1(-np.exp(-bound))
        assert stats.poisson.sf(int((values > bound).sum()) - 1, expected) > 1e-4
        assert stats.poisson.cdf(int((values > bound).sum()), expected) > 1e-4


@settings(deadline=None, max_examples=50)
@given(
    seeds=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=4),
    num_tokens=st.integers(1, 100),
    scale=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    data=st.data(),
)
def test_a_tokens_noise_is_the_same_among_others_and_by_torch(
    seeds: list[int], num_tokens: int, scale: float, data: st.DataObject
) -> None:
    keys, scales = keys_of(seeds, [7]), torch.full((len(seeds),), scale)
    gumbel = noise.gumbel if kernels() is None else native.gumbel
    whole = gumbel(keys, scales, num_tokens)
    some = torch.tensor(data.draw(st.lists(st.integers(0, num_tokens - 1), min_size=1, max_size=40)))
    assert torch.equal(gumbel(keys, scales, len(some), some), whole[:, some])
    assert torch.equal(gumbel(keys[:1], scales[:1], num_tokens), whole[:1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.backends.noise._MOST_AT_ONCE", 3 * num_tokens - 1)  # two keys at a time
        torch.testing.assert_close(noise.gumbel(keys, scales, num_tokens), whole, rtol=1e-5, atol=2e-6)


def noise_of(requests: Sequence[tuple[float, int, int, int]], num_levels: int) -> Noise:
    """The noise ahead of requests, each (temperature, tokens that are known, seed, top-k)."""
    table = SamplingTable(len(requests), CPU)
    for slot, (temperature, length, seed, top_k) in enumerate(requests):
        request = RequestState(
            request_id="0",
            token_ids=[0] * length,
            num_prompt_tokens=length,
            sampling=params(9, temperature=temperature, top_k=top_k),
            seed=seed,
        )
        table.load(request, slot)
    roots = torch.tensor([length - 1 for _, length, _, _ in requests])
    return table.noise_ahead(torch.arange(len(requests)), roots, num_levels)


def of_level(ahead: Noise, level: int) -> Tensor:
    return noise.gumbel(ahead.keys[:, level], ahead.temperatures, 50)


def test_noise_ahead_is_that_of_the_next_positions() -> None:
    ahead = noise_of([(0.7, 9, -1, 0), (0.0, 4, 3, 0), (1.5, 30, 2**64 + 5, 0)], 3)
    for level in range(3):
        made = of_level(ahead, level)
        for row, (temperature, position, seed) in enumerate(((0.7, 9, 2**64 - 1), (0.0, 4, 3), (1.5, 30, 5))):
            [expected] = noise.gumbel(keys_of([seed], [position + level]), ONE, 50)
            torch.testing.assert_close(made[row], temperature * expected)
    torch.testing.assert_close(of_level(ahead.rows(torch.tensor([2])), 1), of_level(ahead, 1)[2:])


def test_greedy_requests_have_none() -> None:
    ahead = noise_of([(0.0, 9, 1, 0), (0.9, 9, 1, 1)], 4)
    assert not any(of_level(ahead, level).any() for level in range(4))
