"""Compaction in one launch moves what torch's indexing moves."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from engine.backends.backend import Place
from engine.backends.kv_cache import KVCache
from engine.backends.torch.backend import TorchBackend
from tests.engine.backends.triton.cases import DEVICE, TritonBackend, compact
from tests.engine.tiny import CONFIG, CPU, tiny_config


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    head_dim=st.sampled_from([16, 24, 96]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    data=st.data(),
)
def test_overlapping_moves_of_all_layers(
    sizes: list[int], head_dim: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    """Each request permutes slots of its own, or copies some of them: every move's source may be another's
    destination."""
    cache = KVCache(tiny_config(head_dim=head_dim), 8, 8, dtype, DEVICE)
    for values in (cache.k, cache.v):
        values.copy_(torch.randn(values.shape, generator=torch.Generator().manual_seed(1)))
    order = torch.randperm(64, generator=torch.Generator().manual_seed(sum(sizes))).tolist()
    width = max(sizes)
    sources = torch.zeros(len(sizes), width, dtype=torch.int64)
    destinations = torch.zeros_like(sources)
    for request, size in enumerate(sizes):
        own = [order.pop() for _ in range(size)]
        ends = data.draw(st.permutations(own))
        starts = data.draw(st.lists(st.sampled_from(own), min_size=size, max_size=size))
        destinations[request, :size], sources[request, :size] = torch.tensor(ends), torch.tensor(starts)
    moves = sources != destinations
    expected = [values.cpu().clone() for values in (cache.k, cache.v)]
    for values in expected:
        values[:, :, destinations[moves]] = values[:, :, sources[moves]]
    compact(cache.k, cache.v, sources.to(DEVICE), destinations.to(DEVICE))
    assert torch.equal(cache.k.cpu(), expected[0]) and torch.equal(cache.v.cpu(), expected[1])


def test_the_backend_compacts_by_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    caches = [KVCache(CONFIG, 2, 4, torch.float32, device) for device in (CPU, DEVICE)]
    backends = [
        make(Place(CONFIG, cache.k.device, torch.float32, torch.float32, 4))
        for make, cache in zip((TorchBackend, TritonBackend), caches, strict=True)
    ]
    for cache in caches:
        cache.k.copy_(torch.arange(8.0).view(1, 1, 8, 1).expand_as(cache.k))
        cache.v.copy_(-cache.k)
    monkeypatch.setattr(torch.Tensor, "__setitem__", None)  # torch's own way
    sources, destinations = (
        torch.tensor([[5, 1, 2, 6], [0, 0, 7, 3]]),
        torch.tensor([[1, 2, 5, 6], [0, 0, 3, 7]]),
    )
    backends[1].move(caches[1], sources.to(DEVICE), destinations.to(DEVICE))
    monkeypatch.undo()
    backends[0].move(caches[0], sources, destinations)
    assert torch.equal(caches[0].k, caches[1].k.cpu()) and torch.equal(caches[0].v, caches[1].v.cpu())
    assert caches[0].k[0, 0, :, 0].tolist() == [0, 5, 1, 7, 4, 2, 6, 3]


def test_no_moves_at_all() -> None:
    cache = KVCache(CONFIG, 2, 4, torch.float32, DEVICE)
    nothing = torch.zeros(3, 0, dtype=torch.int64, device=DEVICE)
    compact(cache.k, cache.v, nothing, nothing)


def test_more_moves_than_a_tree_has_nodes_are_refused() -> None:
    cache = KVCache(CONFIG, 2, 4, torch.float32, DEVICE)
    moves = torch.zeros(1, 65, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="65 moves"):
        compact(cache.k, cache.v, moves, moves)


def test_writes_leave_padding_out() -> None:
    place = Place(CONFIG, DEVICE, torch.float32, torch.float32, 4)
    cache = place.cache(2)
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 3, CONFIG.num_kv_heads, CONFIG.head_dim, generator=generator).to(DEVICE)
    slots = torch.tensor([5, -1, 2], device=DEVICE)
    TritonBackend(place).write(cache, 1, slots, k, v, is_padded=True)
    expected = place.cache(2)
    expected.write_padded(1, slots, k, v)
    assert torch.equal(cache.k, expected.k) and torch.equal(cache.v, expected.v)
