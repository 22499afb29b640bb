"""The attention kernels read what the plain implementation does, whatever a pass holds, however it is cut.

On a CPU they run in Triton's interpreter, which takes milliseconds for each program: passes are small.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from engine.backends.kv_cache import KVCache
from engine.backends.torch.attention import PagedAttention
from engine.backends.triton.plan import AttentionPlan, Capacity, programs_at_once
from engine.backends.triton.tiles import PagedHeads, choose_tile, query_counts
from engine.model.layers import apply_rope
from engine.model.rope import rotation_table
from tests.engine.backends.triton.cases import DEVICE, Case, TritonAttention, make_case, step_on, warm_up
from tests.engine.passes import make_pass
from tests.engine.tiny import CONFIG, tiny_decoder

TOLERANCES = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
MIXED = [(0, 70, 0), (90, 0, 33), (40, 0, 1), (200, 3, 0), (0, 1, 64), (17, 9, 5)]

requests = st.lists(
    st.tuples(st.integers(0, 200), st.integers(0, 12), st.integers(0, 24)).filter(lambda r: r[1] + r[2] > 0),
    min_size=1,
    max_size=2,
)


def plan_of(case: Case, num_programs: int | None = None) -> AttentionPlan:
    heads = PagedHeads.of(case.cache, case.num_heads)
    return AttentionPlan.for_step(case.step, heads, DEVICE, num_programs)


def expected_of(case: Case) -> Tensor:
    attention = PagedAttention(case.reference_step, case.reference_cache, case.num_heads)
    return attention(0, *case.reference_inputs)


def check(case: Case, num_programs: int | None = None) -> AttentionPlan:
    plan = plan_of(case, num_programs)
    found = TritonAttention(plan, case.cache, case.step.slots, case.step.ancestors)(0, case.q, case.k, case.v)
    tolerance = TOLERANCES[case.q.dtype]
    assert found.dtype == case.q.dtype
    torch.testing.assert_close(found.cpu().float(), expected_of(case), rtol=tolerance, atol=tolerance)
    return plan


@settings(max_examples=20, deadline=None)
@given(
    lengths=requests,
    block_size=st.sampled_from([1, 3, 16, 40, 256]),
    heads=st.sampled_from(
        [(4, 2, 32), (3, 3, 64), (9, 3, 64), (6, 1, 96), (2, 2, 128), (4, 2, 256), (20, 1, 16)]
    ),
    dtype=st.sampled_from(list(TOLERANCES)),
    programs=st.sampled_from([1, 8, 200]),
    seed=st.integers(0, 1000),
)
def test_attention_follows_the_visibility_rule(
    lengths: list[tuple[int, int, int]],
    block_size: int,
    heads: tuple[int, int, int],
    dtype: torch.dtype,
    programs: int,
    seed: int,
) -> None:
    check(make_case(lengths, heads, block_size=block_size, seed=seed, dtype=dtype), programs)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_prompts_trees_and_single_tokens_in_one_launch(dtype: torch.dtype) -> None:
    case = make_case(MIXED, (4, 2, 32), dtype=dtype)
    check(case)
    assert torch.equal(case.cache.k.cpu().float(), case.reference_cache.k)
    assert torch.equal(case.cache.v.cpu().float(), case.reference_cache.v)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_rotation_in_the_kernel_is_the_decoders(dtype: torch.dtype) -> None:
    case = make_case([(33, 9, 4), (0, 3, 0)], (9, 3, 24), dtype=dtype)
    cos, sin = (
        table[case.reference_step.positions].unsqueeze(1)
        for table in rotation_table(10.0 ** -torch.linspace(0, 4, 12), 64)
    )
    q, k, v = case.reference_inputs
    attention = PagedAttention(case.reference_step, case.reference_cache, 9)
    expected = attention(0, apply_rope(q, cos, sin), apply_rope(k, cos, sin), v)
    attention = TritonAttention(plan_of(case), case.cache, case.step.slots, case.step.ancestors)
    table = [x.to(DEVICE) for x in (cos, sin)]
    found = attention.rotate_and_attend(0, case.q, case.k, case.v, *table)
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(found.cpu().float(), expected, rtol=tolerance, atol=tolerance)
    stored = case.cache.k.cpu().float()
    torch.testing.assert_close(stored, case.reference_cache.k, rtol=tolerance, atol=tolerance)


def test_a_long_context_is_split_and_merged() -> None:
    plan = check(make_case([(2400, 0, 1), (500, 0, 1), (60, 0, 1)], (6, 2, 64)), num_programs=400)
    pieces = plan.merges[:, 3].tolist()
    assert pieces == [19, 4]  # the first needs two turns of merging, the last is not split
    assert len(plan.items) == 19 + 4 + 1


def test_a_split_that_a_row_sees_nothing_of_has_no_share() -> None:
    # The first half of the prompt chunk ends before the second run of 128 keys, as do the first nodes.
    plan = check(make_case([(120, 20, 0), (120, 0, 20)], (2, 1, 16)), num_programs=400)
    assert set(plan.merges[:, 3].tolist()) == {2}


def test_a_float8_cache_is_read_as_what_it_holds() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        case = make_case([(70, 0, 9), (0, 20, 0)], (4, 2, 32), dtype=dtype, stored=torch.float8_e4m3fn)
        case.k[0], case.v[3] = 1000.0, -1e9  # the largest float8 has is 448
        for values in (case.k, case.v):
            values.copy_(values.clamp(-448.0, 448.0).to(torch.float8_e4m3fn).to(dtype))
        expected = expected_of(case)
        case.k[0], case.v[3] = 1000.0, -1e9
        plan = plan_of(case)
        attention = TritonAttention(plan, case.cache, case.step.slots, case.step.ancestors)
        found = attention(0, case.q, case.k, case.v)
        assert case.cache.k.dtype == torch.float8_e4m3fn
        assert torch.equal(case.cache.k.cpu().float(), case.reference_cache.k)
        assert torch.equal(case.cache.v.cpu().float(), case.reference_cache.v)
        torch.testing.assert_close(found.cpu().float(), expected, rtol=2e-2, atol=2e-2)


def test_numbers_left_in_slots_that_nobody_sees_do_no_harm() -> None:
    case = make_case([(20, 0, 3), (0, 5, 0)], (4, 2, 32))
    expected = expected_of(case)
    used = torch.zeros(case.cache.k.shape[2], dtype=torch.bool)
    for table, end in zip(case.step.block_tables, case.step.context_lens, strict=True):
        positions = torch.arange(int(end))
        used[torch.tensor(table)[positions // 16] * 16 + positions % 16] = True
    for stored in (case.cache.k, case.cache.v):
        stored[:, :, ~used] = float("nan")
    # Where a tree will end may not be known when it is planned, only where it cannot reach.
    case.step = replace(case.step, context_lens=case.step.context_lens + 9)
    found = TritonAttention(plan_of(case), case.cache, case.step.slots, case.step.ancestors)(
        0, case.q, case.k, case.v
    )
    torch.testing.assert_close(found.cpu(), expected, rtol=2e-5, atol=2e-5)


def padded(values: Tensor, length: int, filler: float) -> Tensor:
    more = length - len(values)
    return torch.cat((values, values.new_full((more, *values.shape[1:]), filler)))


def captured(attention: TritonAttention, *inputs: Tensor) -> Callable[[], Tensor]:
    """A call as a CUDA graph, whose launches stay what they were; on the CPU the call itself."""
    if DEVICE.type == "cpu":
        return lambda: attention(0, *inputs)
    attention(0, *inputs)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention(0, *inputs)

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


def test_one_reserved_plan_serves_pass_after_pass() -> None:
    num_tokens, num_blocks, heads = 104, 40, (4, 2, 32)
    first = make_case([(num_blocks * 16 - 1, 1, 0)], heads)
    plan = AttentionPlan.reserve(
        Capacity(6, num_tokens, 64, 20), PagedHeads.of(first.cache, 4), DEVICE, num_programs=40
    )
    slots = torch.full((num_tokens,), -1, device=DEVICE)
    ancestors = torch.zeros(num_tokens, dtype=torch.int64, device=DEVICE)
    inputs = [padded(x, num_tokens, 0.0) for x in (first.q, first.k, first.v)]
    call = captured(TritonAttention(plan, first.cache, slots, ancestors), *inputs)
    assert not call().any()  # nothing is planned yet
    for seed, lengths in enumerate((MIXED[1:3], [(300, 0, 1)], [(0, 0, 0)], MIXED[1:5])):
        case = make_case(lengths, heads, seed=seed)
        plan.update(case.step)
        slots.copy_(padded(case.step.slots, num_tokens, -1))
        ancestors.copy_(padded(case.step.ancestors, num_tokens, 0))
        for static, values in zip(inputs, (case.q, case.k, case.v), strict=True):
            static.copy_(padded(values, num_tokens, float("nan")))
        used = case.cache.k.shape[2]
        for static, values in ((first.cache.k, case.cache.k), (first.cache.v, case.cache.v)):
            static[:, :, :used] = values
            static[:, :, used:] = 7.0
        found = call().cpu()
        real = len(case.step.slots)
        if real:
            torch.testing.assert_close(found[:real], expected_of(case), rtol=2e-5, atol=2e-5)
        assert torch.equal(first.cache.k[:, :, :used].cpu(), case.reference_cache.k)
        assert (first.cache.k[:, :, used:] == 7.0).all() and not found[real:].any()


@pytest.mark.parametrize(
    "heads", [(32, 8, 128), (9, 3, 64), (28, 4, 96), (8, 4, 256), (16, 16, 64), (71, 1, 64)]
)
def test_every_tile_is_known_at_start_up(heads: tuple[int, int, int]) -> None:
    shape = PagedHeads(*heads, block_size=16, itemsize=2)
    tiles = [replace(choose_tile(shape, count), queries=0) for count in range(1, 700)]
    known = [replace(choose_tile(shape, count), queries=0) for count in query_counts(shape)]
    assert set(tiles) == set(known) and len(known) == len(set(known))
    assert all(
        choose_tile(shape, count).queries * shape.group <= choose_tile(shape, count).rows
        for count in range(1, 99)
    )


@pytest.mark.parametrize(
    ("max_queries", "shared_memory", "programs"),
    [(1, 228 << 10, 3 * 132), (64, 228 << 10, 132), (1, 164 << 10, 2 * 132), (64, 100 << 10, 132)],
    ids=["decoding", "prompts", "less shared memory", "much less"],
)
def test_a_plan_has_work_for_as_many_programs_as_run_at_once(
    max_queries: int, shared_memory: int, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    processors = SimpleNamespace(multi_processor_count=132, shared_memory_per_multiprocessor=shared_memory)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: processors)
    heads = PagedHeads(num_heads=32, num_kv_heads=8, head_dim=128, block_size=16, itemsize=2)
    assert programs_at_once(torch.device("cuda"), choose_tile(heads, max_queries)) == programs


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_float32_has_tiles_of_few_rows_which_fit_the_registers(head_dim: int) -> None:
    heads = PagedHeads(num_heads=9, num_kv_heads=3, head_dim=head_dim, block_size=16, itemsize=4)
    tiles = [choose_tile(heads, count) for count in query_counts(heads)]
    assert [(tile.rows, tile.num_warps) for tile in tiles] == [(16, 4), (32, 8)]


def test_warming_up_leaves_the_cache_alone() -> None:
    case = make_case([(30, 0, 8)], (4, 2, 32))
    before = case.cache.k.clone(), case.cache.v.clone()
    warm_up(case.cache, 4, torch.float32)
    assert torch.equal(case.cache.k, before[0]) and torch.equal(case.cache.v, before[1])


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(32, 8, 128), (9, 3, 64), (32, 4, 96), (8, 4, 256)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large_passes(heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    check(make_case([(9000, 0, 64), *[(2000, 0, 1)] * 31, (500, 700, 0)], heads, dtype=dtype))
    check(make_case([(16000, 0, 1)], heads, block_size=64, dtype=dtype))


@settings(max_examples=60, deadline=None)
@given(
    lengths=requests,
    room=st.integers(0, 3),
    queries=st.sampled_from([1, 5, 64, 104]),
    programs=st.integers(1, 300),
    seed=st.integers(0, 99),
)
def test_whatever_fits_the_capacity_fits_the_plan(
    lengths: list[tuple[int, int, int]], room: int, queries: int, programs: int, seed: int
) -> None:
    step, _ = make_pass([(known, min(chunk, queries), 0) for known, chunk, _ in lengths if chunk], 16, seed)
    if not len(step.slots):
        return
    capacity = Capacity(
        num_requests=len(step.block_tables) + room,
        num_tokens=len(step.slots) + room,
        max_queries=queries,
        max_blocks=max(map(len, step.block_tables)),
    )
    heads = PagedHeads(num_heads=9, num_kv_heads=3, head_dim=64, block_size=16, itemsize=2)
    plan = AttentionPlan.reserve(capacity, heads, DEVICE, programs)
    plan.update(step)
    items = plan.items.cpu().numpy()
    items = items[items[:, 1] > items[:, 0]]
    # Every query meets every key that it sees exactly once.
    for row, prefix in enumerate(step.prefix_len):
        mine = items[(items[:, 0] <= row) & (row < items[:, 1])]
        met = np.concatenate([np.arange(first, end) for first, end in mine[:, 2:4]])
        assert len(np.unique(met)) == len(met) and set(range(prefix)) <= set(met.tolist())
    partials = items[items[:, 4] >= 0, 4]
    assert sorted(partials.tolist()) == list(range(len(partials))) and len(partials) <= len(plan.partials)


def test_a_pass_beyond_the_capacity_is_refused() -> None:
    heads = PagedHeads(num_heads=4, num_kv_heads=2, head_dim=16, block_size=16, itemsize=2)
    plan = AttentionPlan.reserve(Capacity(2, 8, 4, 2), heads, DEVICE)
    for lengths, name in (([(0, 9, 0)], "tokens"), ([(90, 1, 0)], "blocks"), ([(0, 1, 0)] * 9, "items")):
        with pytest.raises(ValueError, match=name):
            plan.update(make_pass(lengths, 16, 0)[0])


@torch.inference_mode()
def test_a_pass_of_the_decoder_is_the_same() -> None:
    decoder = copy.deepcopy(tiny_decoder()).to(DEVICE)
    step, num_blocks = make_pass(MIXED, 16, 5)
    step = step_on(step, DEVICE)
    hidden, caches = [], []
    for attention in (PagedAttention, TritonAttention.for_step):
        cache = KVCache(CONFIG, num_blocks, 16, torch.float32, DEVICE)
        hidden.append(decoder(step.token_ids, step.positions, attention(step, cache, 4)))
        caches.append(cache)
    torch.testing.assert_close(hidden[1], hidden[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(caches[1].k, caches[0].k, rtol=1e-4, atol=1e-5)
