"""The batched walk over trees keeps what a plain walk of each tree by itself keeps."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.families import chain, families
from trees.family import TreeFamily
from trees.verify import DraftTrees, deepest_accepted, exact_edges


@st.composite
def shapes(draw: st.DrawFn, max_nodes: int = 24) -> list[int]:
    """Parents of one tree in any valid order, the root first."""
    size = draw(st.integers(1, max_nodes))
    return [0, *(draw(st.integers(0, node - 1)) for node in range(1, size))]


def path_to(parents: Sequence[int], node: int) -> list[int]:
    return [0] if node == 0 else [*path_to(parents, parents[node]), node]


def walk(parents: Sequence[int], tokens: list[int], targets: list[int]) -> int:
    """From the root: follow the child that equals the target, while there is one."""
    node = 0
    while True:
        children = [n for n in range(1, len(parents)) if parents[n] == node and tokens[n] == targets[node]]
        if not children:
            return node
        node = children[0]


def build(
    parents: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]] | None = None, spare_depth: int = 0
) -> DraftTrees:
    """Trees of these shapes, the shorter ones filled up with what must not matter."""
    width = max(map(len, parents))
    deepest = max(len(path_to(shape, node)) - 1 for shape in parents for node in range(len(shape)))
    tokens = tokens or [[0] * len(shape) for shape in parents]
    return DraftTrees.build(
        torch.tensor([[*row, *[0] * (width - len(row))] for row in tokens]),
        torch.tensor([[*shape, *[0] * (width - len(shape))] for shape in parents]),
        torch.tensor([len(shape) for shape in parents]),
        deepest + spare_depth,
    )


def kept(
    parents: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]
) -> list[int]:
    trees = build(parents, tokens)
    width = trees.tokens.shape[1]
    padded = torch.tensor([[*row, *[0] * (width - len(row))] for row in targets])
    return deepest_accepted(exact_edges(padded, trees), trees).tolist()


@settings(max_examples=200, deadline=None)
@given(parents=st.lists(shapes(), min_size=1, max_size=4), spare_depth=st.integers(0, 9))
def test_structure_equals_that_of_each_tree_by_itself(parents: list[list[int]], spare_depth: int) -> None:
    trees = build(parents, spare_depth=spare_depth)
    length = trees.paths.shape[2]
    for index, shape in enumerate(parents):
        for node in range(len(shape)):
            path = path_to(shape, node)
            assert trees.depths[index, node] == len(path) - 1
            assert trees.paths[index, node].tolist() == [*path, *[node] * (length - len(path))]
            assert trees.ancestors[index, node] == sum(1 << n for n in path)
        deepest = max(len(path_to(shape, node)) - 1 for node in range(len(shape)))
        assert trees.tree_depths[index] == deepest


def test_sets_reach_up_to_the_sign_bit() -> None:
    ancestors = build([chain(63).parents]).ancestors[0].tolist()
    assert [bits % 2**64 for bits in ancestors] == [2 ** (node + 1) - 1 for node in range(64)]


@settings(max_examples=300, deadline=None)
@given(parents=st.lists(shapes(), min_size=1, max_size=5), data=st.data())
def test_walk_equals_a_plain_one(parents: list[list[int]], data: st.DataObject) -> None:
    tokens, targets = [], []
    for shape in parents:
        row = [0] * len(shape)
        for parent in range(len(shape)):  # siblings differ, as drafters promise; few tokens: many match
            children = [n for n in range(1, len(shape)) if shape[n] == parent]
            distinct = data.draw(st.permutations(range(max(4, len(children)))))
            for child, token in zip(children, distinct, strict=False):
                row[child] = token
        tokens.append(row)
        targets.append(data.draw(st.lists(st.integers(0, 4), min_size=len(shape), max_size=len(shape))))
    expected = [walk(*tree) for tree in zip(parents, tokens, targets, strict=True)]
    assert kept(parents, tokens, targets) == expected


def test_target_zero_does_not_accept_what_a_shorter_tree_has_not() -> None:
    # Node 1 was never drafted for the first request; its place in the batch holds a zero.
    long = [0, 0, 1, 2]
    assert kept([[0], long], [[5], [5, 0, 0, 0]], [[0], [0, 0, 0, 0]]) == [0, 3]


def test_token_zero_is_accepted_where_it_was_drafted() -> None:
    family = TreeFamily(((0,), (1,), (1, 0)), (0.5, 0.3, 0.2))
    assert kept([family.parents], [[9, 3, 0, 0]], [[0, 8, 0, 8]]) == [3]


def test_a_child_is_not_reached_past_a_parent_that_was_refused() -> None:
    assert kept([chain(3).parents], [[9, 4, 5, 6]], [[1, 5, 6, 7]]) == [0]


def test_deepest_path_wins_and_of_equal_ones_the_first() -> None:
    family = TreeFamily(((0,), (1,), (1, 0), (0, 0)), (0.5, 0.4, 0.3, 0.2))
    trees = build([family.parents, family.parents])
    # Typical acceptance may follow several children of a node.
    edges = torch.tensor([[False, True, True, True, False], [False, True, True, True, True]])
    assert deepest_accepted(edges, trees).tolist() == [3, 3]


@settings(max_examples=50, deadline=None)
@given(family=families())
def test_a_family_gives_the_same_structure(family: TreeFamily) -> None:
    trees = build([family.parents])
    assert trees.depths[0].tolist() == list(family.depths)
    assert [bits % 2**64 for bits in trees.ancestors[0].tolist()] == list(family.ancestors)


@pytest.mark.parametrize("size", [1, 2, 63, 64])
def test_trees_up_to_the_limit(size: int) -> None:
    assert kept([chain(63).parents[:size]], [list(range(size))], [list(range(1, size + 1))]) == [size - 1]
