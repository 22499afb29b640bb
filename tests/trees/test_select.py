"""The nodes that are kept are the likeliest ones, and a tree."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.families import chain, families
from trees.family import TreeFamily
from trees.select import likeliest_nodes

log_probs = st.one_of(st.just(0.0), st.just(-1.0), st.floats(-20.0, 0.0, width=32))


def kept(family: TreeFamily, rows: list[list[float]], sizes: list[int]) -> list[tuple[list[int], list[int]]]:
    """Kept nodes and their parents among them, of each request."""
    nodes, parents = likeliest_nodes(
        torch.tensor(rows), torch.tensor(family.parents), family.max_depth, torch.tensor(sizes), max(sizes)
    )
    return [(n[:size].tolist(), p[:size].tolist()) for n, p, size in zip(nodes, parents, sizes, strict=True)]


@settings(max_examples=300, deadline=None)
@given(family=families(), data=st.data())
def test_kept_nodes_are_a_tree_in_family_order_and_none_left_out_is_likelier(
    family: TreeFamily, data: st.DataObject
) -> None:
    offered = len(family.paths) + 1
    num_requests = data.draw(st.integers(1, 4))
    sizes = [data.draw(st.integers(1, offered)) for _ in range(num_requests)]
    rows = [[0.0, *(data.draw(log_probs) for _ in range(offered - 1))] for _ in sizes]
    for row, size, (nodes, parents) in zip(rows, sizes, kept(family, rows, sizes), strict=True):
        assert nodes == sorted(set(nodes)) and len(nodes) == size and nodes[0] == 0
        assert parents[0] == 0
        for place in range(1, size):
            assert parents[place] < place
            assert nodes[parents[place]] == family.parents[nodes[place]]
        scores = [sum(row[n] for n in path) for path in family.path_nodes]
        worst = min(scores[node] for node in nodes)
        assert all(scores[node] <= worst + 1e-4 for node in range(offered) if node not in nodes)


@settings(max_examples=50, deadline=None)
@given(family=families(), data=st.data())
def test_a_budget_for_all_that_is_offered_gives_the_family_itself(
    family: TreeFamily, data: st.DataObject
) -> None:
    row = [0.0, *(data.draw(log_probs) for _ in family.paths)]
    [(nodes, parents)] = kept(family, [row], [len(row)])
    assert nodes == list(range(len(row)))
    assert parents == list(family.parents)


def test_equally_likely_nodes_are_taken_in_the_family_s_order() -> None:
    family = TreeFamily(((0,), (1,), (0, 0), (1, 0)), (0.5, 0.4, 0.3, 0.2))
    assert kept(family, [[0.0] * 5], [3]) == [([0, 1, 2], [0, 0, 0])]


def test_certain_guesses_grow_a_chain_and_uncertain_ones_a_fan() -> None:
    family = TreeFamily(((0,), (1,), (2,), (0, 0), (0, 0, 0)), (0.5, 0.4, 0.3, 0.2, 0.1))
    certain = [0.0, -0.1, -3.0, -4.0, -0.1, -0.1]
    torn = [0.0, -1.1, -1.1, -1.2, -1.1, -1.1]
    assert kept(family, [certain, torn], [4, 4]) == [
        ([0, 1, 4, 5], [0, 0, 1, 2]),
        ([0, 1, 2, 3], [0, 0, 0, 0]),
    ]


def test_children_of_certain_parents_never_come_before_them() -> None:
    sizes = list(range(1, 65))
    for nodes, _ in kept(chain(63), [[0.0] * 64] * 64, sizes):
        assert nodes == list(range(len(nodes)))
