"""The batched walk over trees keeps what a plain walk of each tree by itself keeps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.families import chain, families
from trees.family import TreeFamily
from trees.verify import TreeTables, deepest_accepted, exact_edges

CPU = torch.device("cpu")


def walk(family: TreeFamily, tokens: list[int], targets: list[int], num_nodes: int) -> int:
    """From the root: follow the child that equals the target, while there is one."""
    node = 0
    while True:
        children = [
            n for n in range(1, num_nodes) if family.parents[n] == node and tokens[n] == targets[node]
        ]
        if not children:
            return node
        node = children[0]


def kept(
    family: TreeFamily, tokens: list[list[int]], targets: list[list[int]], sizes: list[int]
) -> list[int]:
    tables = TreeTables.build(family, CPU).prefix(max(sizes))
    edges = exact_edges(torch.tensor(tokens), torch.tensor(targets), tables)
    return deepest_accepted(edges, torch.tensor(sizes), tables).tolist()


@settings(max_examples=300, deadline=None)
@given(family=families(), data=st.data())
def test_walk_equals_a_plain_one(family: TreeFamily, data: st.DataObject) -> None:
    requests = data.draw(st.integers(1, 5))
    sizes = [data.draw(st.integers(1, len(family.paths) + 1)) for _ in range(requests)]
    width = max(sizes)
    tokens, targets = [], []
    for _ in range(requests):
        row = [0] * width
        for parent in range(width):  # siblings differ, as drafters promise; few tokens, so that many match
            children = [n for n in range(1, width) if family.parents[n] == parent]
            distinct = data.draw(st.permutations(range(max(4, len(children)))))
            for child, token in zip(children, distinct, strict=False):
                row[child] = token
        tokens.append(row)
        targets.append(data.draw(st.lists(st.integers(0, 4), min_size=width, max_size=width)))
    expected = [walk(family, *row) for row in zip(tokens, targets, sizes, strict=True)]
    assert kept(family, tokens, targets, sizes) == expected


def test_target_zero_does_not_accept_what_a_shorter_tree_has_not() -> None:
    # Node 1 was never drafted for the first request; its place in the table holds a zero.
    assert kept(chain(3), [[5, 0, 0, 0], [5, 0, 0, 0]], [[0, 0, 0, 0], [0, 0, 0, 0]], [1, 4]) == [0, 3]


def test_token_zero_is_accepted_where_it_was_drafted() -> None:
    family = TreeFamily(((0,), (1,), (1, 0)), (0.5, 0.3, 0.2))
    assert kept(family, [[9, 3, 0, 0]], [[0, 8, 0, 8]], [4]) == [3]


def test_a_child_is_not_reached_past_a_parent_that_was_refused() -> None:
    assert kept(chain(3), [[9, 4, 5, 6]], [[1, 5, 6, 7]], [4]) == [0]


def test_deepest_path_wins_and_of_equal_ones_the_first() -> None:
    family = TreeFamily(((0,), (1,), (1, 0), (0, 0)), (0.5, 0.4, 0.3, 0.2))
    tables = TreeTables.build(family, CPU)
    # Typical acceptance may follow several children of a node.
    edges = torch.tensor([[False, True, True, True, False], [False, True, True, True, True]])
    assert deepest_accepted(edges, torch.tensor([5, 5]), tables).tolist() == [3, 3]


@settings(max_examples=50, deadline=None)
@given(family=families(), data=st.data())
def test_tables_of_a_prefix_are_the_prefix_of_the_tables(family: TreeFamily, data: st.DataObject) -> None:
    size = data.draw(st.integers(0, len(family.paths)))
    cut = TreeTables.build(family, CPU).prefix(size + 1)
    own = TreeTables.build(family.prefix(size), CPU)
    for name in ("parents", "depths", "ranks"):
        assert torch.equal(getattr(cut, name), getattr(own, name))
    width = own.paths.shape[1]
    assert torch.equal(cut.paths[:, :width], own.paths)


@pytest.mark.parametrize("size", [1, 2, 63, 64])
def test_trees_up_to_the_limit(size: int) -> None:
    family = chain(63)
    tokens = [list(range(size))]
    targets = [list(range(1, size + 1))]
    assert kept(family, tokens, targets, [size]) == [size - 1]
