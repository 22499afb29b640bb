"""The visibility rule, and that a tree-masked pass over the paged cache is a causal pass along each path."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.backends.kv_cache import KVCache
from engine.backends.torch import attention
from engine.backends.torch.attention import PagedAttention
from engine.backends.visibility import visibility
from engine.batch import Batch, RequestState, ScheduledRequest
from tests.engine.families import chain, families, full
from tests.engine.helpers import params
from tests.engine.passes import lay_out_batch
from tests.engine.tiny import CONFIG, CPU, VOCAB, plain_pass, tiny_decoder
from trees.family import TreeFamily
from trees.verify import DraftTrees

signed_sets = st.integers(0, 2**64 - 1).map(lambda bits: bits - 2**64 if bits >= 2**63 else bits)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 100), signed_sets), min_size=1, max_size=5), st.integers(1, 200))
def test_rule_equals_a_plain_reading_of_it(queries: list[tuple[int, int]], num_keys: int) -> None:
    visible = visibility(
        torch.tensor([prefix for prefix, _ in queries]), torch.tensor([bits for _, bits in queries]), num_keys
    )
    for row, (prefix, ancestors) in zip(visible.tolist(), queries, strict=True):
        for key, seen in enumerate(row):
            node = key - prefix
            assert seen == (key < prefix or (node < 64 and bool((ancestors % 2**64) >> node & 1)))


def make_request(known: list[int], num_computed: int, block_table: list[int]) -> RequestState:
    return RequestState(
        request_id="r",
        token_ids=known,
        num_prompt_tokens=len(known),
        sampling=params(64),
        seed=0,
        num_computed=num_computed,
        block_table=block_table,
        seat=0,
    )


@torch.inference_mode()
def node_logits(
    family: TreeFamily, contexts: list[list[int]], trees: list[list[int]], block_size: int, chunk: int
) -> list[torch.Tensor]:
    """Logits of root and drafts of each request, its context computed before in chunks."""
    longest = max(map(len, contexts)) + len(family.paths)
    blocks_each = -(-longest // block_size)
    num_blocks = blocks_each * len(contexts) + 1
    cache = KVCache(CONFIG, num_blocks, block_size, torch.float32, CPU)
    decoder = tiny_decoder()
    order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(1)).tolist()
    requests = [
        make_request(known, 0, order[i * blocks_each : (i + 1) * blocks_each])
        for i, known in enumerate(contexts)
    ]
    while True:
        batch = Batch()
        for request, tree in zip(requests, trees, strict=True):
            num_tokens = min(chunk, request.num_pending)
            last = num_tokens == request.num_pending
            if num_tokens:
                batch.scheduled.append(ScheduledRequest(request, num_tokens, len(tree) if last else 0))
        if all(s.commits for s in batch.scheduled) and len(batch.scheduled) == len(requests):
            break
        batch.scheduled = [s for s in batch.scheduled if not s.commits]
        step = lay_out_batch(batch, block_size)
        decoder(step.token_ids, step.positions, PagedAttention(step, cache, 4))
        for scheduled in batch.scheduled:
            scheduled.request.num_computed += scheduled.num_tokens
    step = lay_out_batch(batch, block_size)
    width = step.commits.max_nodes
    tokens = [
        [known[-1], *tree, *[0] * (width - 1 - len(tree))]
        for known, tree in zip(contexts, trees, strict=True)
    ]
    parents = torch.tensor(family.parents[:width]).expand(len(trees), -1)
    step.fill(DraftTrees.build(torch.tensor(tokens), parents, step.commits.num_nodes, family.max_depth))
    hidden = decoder(step.token_ids, step.positions, PagedAttention(step, cache, 4))
    logits = decoder.logits(hidden[step.commits.rows])
    return list(torch.split(logits, step.commits.num_nodes.tolist()))


def check(
    family: TreeFamily,
    contexts: list[list[int]],
    sizes: list[int],
    block_size: int,
    chunk: int,
    seed: int = 0,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    trees = [torch.randint(0, VOCAB, (size,), generator=generator).tolist() for size in sizes]
    results = node_logits(family, contexts, trees, block_size, chunk)
    for context, tree, logits in zip(contexts, trees, results, strict=True):
        assert len(logits) == len(tree) + 1
        for node, path in enumerate(family.path_nodes[: len(tree) + 1]):
            tokens = [*context, *(tree[n - 1] for n in path[1:])]
            torch.testing.assert_close(logits[node], plain_pass(tokens).logits[-1], atol=2e-5, rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    family=families(max_drafts=12),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    block_size=st.integers(1, 32),
    chunk=st.integers(1, 40),
    data=st.data(),
)
def test_each_node_gets_the_logits_of_a_causal_pass_along_its_path(
    family: TreeFamily, lengths: list[int], block_size: int, chunk: int, data: st.DataObject
) -> None:
    contexts = [[(7 * i + 5 * p) % VOCAB for p in range(n)] for i, n in enumerate(lengths)]
    sizes = [data.draw(st.integers(0, len(family.paths))) for _ in lengths]
    check(family, contexts, sizes, block_size, chunk)


def test_largest_tree_uses_the_sign_bit_of_its_ancestor_set() -> None:
    check(full(), [[5, 6, 7]], [63], block_size=16, chunk=16)
    check(chain(63), [[5, 6, 7]], [63], block_size=16, chunk=16)


def test_long_and_short_requests_in_one_pass() -> None:
    contexts = [[p % VOCAB for p in range(n)] for n in (150, 1, 33, 2)]
    check(full(20), contexts, [20, 0, 3, 13], block_size=16, chunk=64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "keys"), [(1, 16), (3, 200), (24, 160), (192, 640), (600, 1500)])
def test_both_ways_to_attend_agree_with_exact_arithmetic(rows: int, keys: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(rows)
    q, k, v = (torch.randn(2, 3, n, 64, generator=generator).to(dtype) for n in (rows, keys, keys))
    prefix = torch.randint(1, keys, (2, rows), generator=generator)
    hidden = ~visibility(prefix, torch.zeros_like(prefix), keys).unsqueeze(1)
    bias = torch.zeros(2, 1, rows, keys).masked_fill_(hidden, float("-inf"))
    scores = q.double() @ k.double().transpose(2, 3) / 8.0 + bias.double()
    expected = scores.softmax(dim=-1) @ v.double()
    got = attention._attention(q, k, v, bias.to(dtype))
    assert got.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 4e-2
    torch.testing.assert_close(got.double(), expected, atol=tolerance, rtol=tolerance)
