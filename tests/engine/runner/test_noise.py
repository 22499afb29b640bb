"""The noise of draws: Gumbel's, the same however it is computed, and known to drafters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from numpy.typing import NDArray
from scipy import stats

from engine.native import noise as native
from engine.native.library import kernels
from engine.runner.noise import Noise, gumbel, make_keys
from engine.scheduling.drafting import Acceptance
from engine.scheduling.request import Request
from tests.engine.helpers import params
from tests.engine.tiny import CPU

ONE = np.ones(1, dtype=np.float32)


@pytest.fixture(params=["kernels", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """How noise is computed."""
    if request.param == "torch":
        monkeypatch.setattr(native, "gumbel", lambda *_: None)
    elif kernels() is None:
        pytest.skip("no AVX-512 VNNI and BF16, or no C compiler")
    yield request.param


def keys_of(seeds: Any, positions: Any) -> NDArray[np.uint64]:
    return make_keys(np.asarray(seeds, dtype=np.uint64), np.asarray(positions, dtype=np.uint64))


def splitmix(x: int) -> int:
    """One output of SplitMix64, in Python's own integers."""
    mask = 2**64 - 1
    x = (x + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


@given(st.integers(0, 2**64 - 1), st.integers(0, 100_000))
def test_key_is_a_function_of_seed_and_position(seed: int, position: int) -> None:
    [key] = keys_of([seed], [position])
    assert key == splitmix((splitmix(seed) + position * 0x9E3779B97F4A7C15) % 2**64)


@pytest.mark.parametrize("by", ["token", "position", "seed"])
def test_noise_is_gumbel_and_independent_of_its_neighbours(by: str, way: str) -> None:
    count, running = 20_000, np.arange(20_000)
    if by == "token":
        values = gumbel(keys_of([5], [12]), ONE, count, CPU)[0]
    else:
        keys = keys_of(running, [12]) if by == "seed" else keys_of([5], running)
        tokens = torch.tensor([31_000])
        values = gumbel(keys, np.ones(count, dtype=np.float32), 1, CPU, tokens)[:, 0]
    values = values.double().numpy()
    assert stats.kstest(values, "gumbel_r").pvalue > 1e-3
    for distance in (1, 2, 16, 64):
        assert abs(np.corrcoef(values[:-distance], values[distance:])[0, 1]) < 0.03


def test_the_largest_are_as_large_as_chance_has_them(way: str) -> None:
    # Whether rare tokens get their share depends on the far end: of so many values, 1 in e ** 10 exceeds 10.
    keys = keys_of(np.arange(400), [3])
    values = gumbel(keys, np.ones(400, dtype=np.float32), 49_152, CPU)
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
    keys, scales = keys_of(seeds, [7]), np.full(len(seeds), scale, dtype=np.float32)
    whole = gumbel(keys, scales, num_tokens, CPU)
    some = torch.tensor(data.draw(st.lists(st.integers(0, num_tokens - 1), min_size=1, max_size=40)))
    assert torch.equal(gumbel(keys, scales, len(some), CPU, some), whole[:, some])
    assert torch.equal(gumbel(keys[:1], scales[:1], num_tokens, CPU), whole[:1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "gumbel", lambda *_: None)
        patch.setattr("engine.runner.noise._MOST_AT_ONCE", 3 * num_tokens - 1)  # two keys at a time
        torch.testing.assert_close(gumbel(keys, scales, num_tokens, CPU), whole, rtol=1e-5, atol=2e-6)


def request_of(temperature: float, length: int, seed: int, top_k: int = 0) -> Request:
    return Request(
        request_id="0",
        arrival=0,
        token_ids=[0] * length,
        num_prompt_tokens=length,
        sampling=params(9, temperature=temperature, top_k=top_k),
        seed=seed,
        acceptance=Acceptance(),
    )


def test_noise_ahead_is_that_of_the_next_positions() -> None:
    requests = [request_of(0.7, 9, -1), request_of(0.0, 4, 3), request_of(1.5, 30, 2**64 + 5)]
    noise = Noise.ahead(requests, 3)
    assert noise is not None
    for level in range(3):
        made = noise.of_level(level, 50, CPU)
        for row, (temperature, position, seed) in enumerate(((0.7, 9, 2**64 - 1), (0.0, 4, 3), (1.5, 30, 5))):
            [expected] = gumbel(keys_of([seed], [position + level]), ONE, 50, CPU)
            torch.testing.assert_close(made[row], temperature * expected)
    torch.testing.assert_close(noise.rows([2]).of_level(1, 50, CPU), noise.of_level(1, 50, CPU)[2:])


def test_greedy_requests_have_none() -> None:
    assert Noise.ahead([request_of(0.0, 9, 1), request_of(0.0, 3, 2)], 4) is None
    assert Noise.ahead([request_of(0.9, 9, 1, top_k=1)], 4) is None
