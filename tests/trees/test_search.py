"""The tree search: what it promises for any observation, and the order it finds in cases done by hand."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from trees.family import MAX_DRAFT_NODES, TreeFamily
from trees.search import accepted_nodes, family_from_paths

rank_paths = st.lists(st.lists(st.integers(0, 12), max_size=5).map(tuple), min_size=1, max_size=200)


def assert_nested(family: TreeFamily) -> None:
    assert len(family.paths) <= MAX_DRAFT_NODES
    assert len(set(family.paths)) == len(family.paths)
    assert list(family.gains) == sorted(family.gains, reverse=True)
    assert all(0 < gain <= 1 for gain in family.gains)
    for place, path in enumerate(family.paths):
        assert len(path) == 1 or path[:-1] in family.paths[:place]


@given(rank_paths)
def test_family_from_paths_is_nested_and_sorted(observed: list[tuple[int, ...]]) -> None:
    assert_nested(family_from_paths(observed))


@given(rank_paths, st.integers(0, MAX_DRAFT_NODES))
def test_gains_are_what_a_tree_of_any_size_accepts(observed: list[tuple[int, ...]], size: int) -> None:
    family = family_from_paths(observed).prefix(size)
    accepted = sum(accepted_nodes(family, path) for path in observed)
    assert math.isclose(accepted / len(observed), sum(family.gains), abs_tol=1e-9)


def test_counting_paths_keeps_what_hits_have_to_do_with_each_other() -> None:
    # The heads are right together or not at all; multiplied rates would say (0, 0) is worth 0.25.
    family = family_from_paths([(0, 0), (0, 0), (), ()])
    assert family == TreeFamily(((0,), (0, 0)), (0.5, 0.5))


def test_a_path_is_accepted_as_far_as_the_tree_has_it() -> None:
    family = TreeFamily(((0,), (0, 1)), (0.5, 0.2))
    assert [accepted_nodes(family, path) for path in [(), (1,), (0,), (0, 0), (0, 1), (0, 1, 0)]] == [
        0,
        0,
        1,
        1,
        2,
        2,
    ]
