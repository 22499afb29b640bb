"""The CPU kernels compute what the modules they replace compute, and every row by itself."""

from __future__ import annotations

import ctypes
import itertools
from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from engine.backends.kv_cache import KVCache
from engine.backends.native import matrix
from engine.backends.native.attention import NativeAttention
from engine.backends.native.decoder import NativeDecoder, can_take
from engine.backends.native.library import kernels
from engine.backends.native.matrix import Kind, NativeLinear, quantize_int8_groups
from engine.backends.rows import PassInput
from engine.backends.torch.attention import PagedAttention
from engine.backends.torch.quantization import quantize_int4
from engine.batch import make_block_table
from engine.errors import ConfigError
from tests.engine.backends.native.decoders import WIDE, random_decoder, wide_config
from tests.engine.passes import make_pass
from tests.engine.tiny import CPU, tiny_config

pytestmark = pytest.mark.skipif(kernels() is None, reason="no AVX-512 VNNI and BF16, or no C compiler")


def weights(out_features: int, in_features: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + out_features)
    return 0.1 * torch.randn(out_features, in_features, generator=generator)


def meant(weight: Tensor, kind: Kind) -> Tensor:
    """The weights that a format stands for, in double precision."""
    if kind == Kind.BF16:
        return weight.bfloat16().double()
    if kind == Kind.INT8:
        codes, scales = quantize_int8_groups(weight)
        return (codes * scales.unsqueeze(-1)).flatten(1).double()
    codes, scales, offsets = quantize_int4(weight)
    scales, offsets = scales.half().double(), offsets.half().double()
    return (codes * scales.unsqueeze(-1) + offsets.unsqueeze(-1)).flatten(1)


def rounded_inputs(x: Tensor, kind: Kind) -> Tensor:
    """Activations as the product sees them."""
    if kind == Kind.BF16:
        return x.double()
    groups = x.double().view(len(x), -1, 32)
    largest = groups.abs().amax(dim=-1, keepdim=True).clamp_min(1e-30)
    return ((groups * 127 / largest).round() * largest / 127).flatten(1)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(list(Kind)),
    blocks=st.integers(1, 7),
    groups=st.integers(1, 9),
    rows=st.integers(1, 40),
    biased=st.booleans(),
)
def test_a_product_is_that_of_the_rounded_numbers(
    kind: Kind, blocks: int, groups: int, rows: int, biased: bool
) -> None:
    weight = weights(16 * blocks, 32 * groups)
    bias = weights(1, 16 * blocks)[0] if biased else None
    x = torch.randn(rows, 32 * groups, generator=torch.Generator().manual_seed(rows)).bfloat16()
    x[rows // 2] = 0.0
    expected = rounded_inputs(x, kind) @ meant(weight, kind).t()
    expected += 0.0 if bias is None else bias.double()
    y = NativeLinear(weight, bias, kind)(x)
    assert y.dtype == torch.float32 and y.shape == expected.shape
    # A code may have rounded the other way: a step of 1/127 of its group's largest times a weight.
    step = 0.0 if kind == Kind.BF16 else 4.0 / 127 * 0.5
    torch.testing.assert_close(y.double(), expected, rtol=2e-4, atol=1e-4 + step)


@pytest.mark.parametrize("kind", list(Kind))
def test_a_row_is_the_same_to_the_last_bit_in_any_company(kind: Kind) -> None:
    linear = NativeLinear(weights(48, 96), None, kind)
    x = torch.randn(64, 96).bfloat16()
    together = linear(x)
    for size in (1, 2, 3, 5, 7, 11, 12, 13, 25):
        assert torch.equal(torch.cat([linear(part) for part in x.split(size)]), together)


def test_weights_of_other_shapes_are_refused() -> None:
    for shape in ((24, 64), (32, 48)):
        with pytest.raises(ConfigError, match=f"{shape[0]}, {shape[1]}"):
            NativeLinear(torch.zeros(shape), None, Kind.INT8)


@given(st.integers(1, 5), st.integers(1, 20), st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_argmax_is_the_first_largest(rows: int, blocks: int, seed: int) -> None:
    x = torch.randint(5, (rows, 16 * blocks), generator=torch.Generator().manual_seed(seed)).float()
    found = matrix.argmax(x)
    assert found is not None
    assert found.tolist() == [row.index(max(row)) for row in x.tolist()]
    assert matrix.argmax(x.bfloat16()) is None and matrix.argmax(x[:, :3]) is None


requests = st.lists(
    st.tuples(st.integers(0, 70), st.integers(0, 40), st.integers(0, 64)).filter(lambda r: r[1] + r[2] > 0),
    min_size=1,
    max_size=4,
)


@settings(max_examples=40, deadline=None)
@given(
    lengths=requests,
    block_size=st.sampled_from([1, 3, 16, 40]),
    heads=st.sampled_from([(4, 2, 32), (3, 3, 64), (6, 1, 96), (2, 2, 128), (50, 1, 32)]),
    seed=st.integers(0, 1000),
)
def test_attention_follows_the_visibility_rule(
    lengths: list[tuple[int, int, int]], block_size: int, heads: tuple[int, int, int], seed: int
) -> None:
    num_heads, num_kv_heads, dim = heads
    config = tiny_config(num_layers=1, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=dim)
    step, num_blocks = make_pass(lengths, block_size, seed)
    caches = [
        KVCache(config, num_blocks, block_size, dtype, CPU) for dtype in (torch.bfloat16, torch.float32)
    ]
    generator = torch.Generator().manual_seed(seed)
    for values in ("k", "v"):
        drawn = torch.randn(getattr(caches[0], values).shape, generator=generator).bfloat16()
        for cache in caches:
            getattr(cache, values).copy_(drawn)
    num_tokens = len(step.slots)
    q, k, v = (
        torch.randn(num_tokens, count, dim, generator=generator).bfloat16()
        for count in (num_heads, num_kv_heads, num_kv_heads)
    )
    found = NativeAttention(step, caches[0], num_heads)(0, q, k, v)
    expected = PagedAttention(step, caches[1], num_heads)(0, q.float(), k.float(), v.float())
    torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.02)
    assert torch.equal(caches[0].k.float(), caches[1].k) and torch.equal(caches[0].v.float(), caches[1].v)


def test_block_tables_are_read_where_requests_keep_them() -> None:
    step, num_blocks = make_pass([(20, 4, 3), (0, 9, 0)], 4, 0)
    tables = [make_block_table(table) for table in step.block_tables]
    cache = KVCache(WIDE, num_blocks, 4, torch.bfloat16, CPU)
    attention = NativeAttention(replace(step, block_tables=tables), cache, WIDE.num_heads)
    places = (ctypes.c_int64 * 2).from_address(attention.paging.block_tables)
    assert list(places) == [table.buffer_info()[0] for table in tables]


CONFIGS = {
    "llama": WIDE,
    "qwen2": wide_config(qkv_bias=True),
    "qwen3": wide_config(qk_norm=True, tie_embeddings=True),
    "biased": wide_config(qkv_bias=True, o_bias=True, mlp_bias=True),
}


@torch.inference_mode()
@pytest.mark.parametrize("name", CONFIGS)
def test_the_decoder_is_the_decoder(name: str) -> None:
    config = CONFIGS[name]
    step, num_blocks = make_pass([(0, 30, 0), (0, 1, 20), (0, 45, 1)], 16, 1)
    decoder = random_decoder(config)
    reference = random_decoder(config).float()
    cache = KVCache(config, num_blocks, 16, torch.float32, CPU)
    attention = PagedAttention(step, cache, config.num_heads)
    expected = reference.logits(reference(step.token_ids, step.positions, attention))
    native = NativeDecoder(decoder, lambda name, weight: Kind.BF16)
    found = logits_of(native, step, KVCache(config, num_blocks, 16, torch.bfloat16, CPU))
    assert (found - expected).norm() < 0.015 * expected.norm()


@torch.inference_mode()
def test_tapped_rows_follow_the_last_and_change_nothing() -> None:
    config = wide_config(num_layers=3)
    step, num_blocks = make_pass([(0, 30, 0), (0, 1, 20)], 16, 1)
    decoder = random_decoder(config)
    reference = random_decoder(config).float()
    cache = KVCache(config, num_blocks, 16, torch.float32, CPU)
    attention = PagedAttention(step, cache, config.num_heads)
    expected = reference(step.token_ids, step.positions, attention, (0, 2))
    native = NativeDecoder(decoder, lambda name, weight: Kind.BF16)
    attention = NativeAttention(step, KVCache(config, num_blocks, 16, torch.bfloat16, CPU), config.num_heads)
    found = native(step.token_ids, step.positions, attention, (0, 2))
    plain = native(step.token_ids, step.positions, attention)
    assert found.shape == expected.shape == (len(step.token_ids), 3 * config.hidden_size)
    for part, right in zip(found.chunk(3, dim=1), expected.chunk(3, dim=1), strict=True):
        assert (part - right).norm() < 0.015 * right.norm()
    assert torch.equal(found[:, : config.hidden_size], plain)


def logits_of(decoder: NativeDecoder, step: PassInput, cache: KVCache) -> Tensor:
    config = decoder.config
    attention = NativeAttention(step, cache, config.num_heads)
    return decoder.logits(decoder(step.token_ids, step.positions, attention))


@torch.inference_mode()
@pytest.mark.parametrize("kind", list(Kind))
def test_a_text_comes_out_the_same_to_the_last_bit_however_it_is_cut(kind: Kind) -> None:
    """At once, token by token, in chunks, beside another request, and as a chain of draft nodes."""
    decoder = NativeDecoder(random_decoder(WIDE), lambda name, weight: kind)
    whole, blocks = make_pass([(0, 70, 0)], 16, 3)

    def part(first: int, end: int, tree: bool = False) -> PassInput:
        rows = slice(first, end)
        nodes = np.arange(end - first)
        return replace(
            whole,
            token_ids=whole.token_ids[rows],
            positions=whole.positions[rows],
            slots=whole.slots[rows],
            prefix_len=np.full(end - first, first) if tree else whole.prefix_len[rows],
            ancestors=torch.from_numpy((2 << nodes) - 1) if tree else whole.ancestors[rows],
            starts=np.array([0, end - first]),
            context_lens=np.array([end]),
        )

    def read(parts: list[PassInput]) -> tuple[Tensor, Tensor]:
        cache = KVCache(WIDE, blocks, 16, torch.bfloat16, CPU)
        return torch.cat([logits_of(decoder, step, cache) for step in parts]), cache.k

    expected, keys = read([whole])
    for cuts in ([*range(71)], [0, 13, 14, 30, 70], [0, 33, 70]):
        found, found_keys = read([part(a, b) for a, b in itertools.pairwise(cuts)])
        assert torch.equal(found, expected) and torch.equal(found_keys, keys)
    found, found_keys = read([part(0, 20), part(20, 33, tree=True), part(33, 70, tree=True)])
    assert torch.equal(found, expected) and torch.equal(found_keys, keys)
    beside, more = make_pass([(0, 70, 0), (0, 9, 30)], 16, 3)
    beside.token_ids[:70] = whole.token_ids
    found = logits_of(decoder, beside, KVCache(WIDE, more, 16, torch.bfloat16, CPU))
    assert torch.equal(found[:70], expected)


def test_a_decoder_that_does_not_fit_is_left_to_torch() -> None:
    assert can_take(random_decoder(WIDE))
    assert not can_take(random_decoder(WIDE).float())
    for change in ({"head_dim": 16}, {"hidden_size": 48}, {"vocab_size": 100}, {"intermediate_size": 80}):
        assert not can_take(random_decoder(wide_config(**change)))
