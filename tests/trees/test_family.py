"""A tree family is a nested list of nodes, and everything derived from it agrees with the rank paths."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings

from tests.engine.families import families
from trees.family import TreeError, TreeFamily

FAMILY = TreeFamily(((0,), (0, 0), (1,), (0, 0, 0), (1, 0), (0, 1)), (0.6, 0.3, 0.2, 0.15, 0.1, 0.05))


def test_structure_of_a_known_family() -> None:
    assert FAMILY.parents == (0, 0, 1, 0, 2, 3, 1)
    assert FAMILY.depths == (0, 1, 2, 1, 3, 2, 2)
    assert FAMILY.ranks == (0, 0, 0, 1, 0, 0, 1)
    assert FAMILY.path_nodes == ((0,), (0, 1), (0, 1, 2), (0, 3), (0, 1, 2, 4), (0, 3, 5), (0, 1, 6))
    assert FAMILY.ancestors == (0b1, 0b11, 0b111, 0b1001, 0b10111, 0b101001, 0b1000011)
    assert FAMILY.max_depth == 3


def test_empty_family_is_the_root_alone() -> None:
    family = TreeFamily((), ())
    assert (family.parents, family.depths, family.path_nodes, family.max_depth) == ((0,), (0,), ((0,),), 0)


@settings(max_examples=50, deadline=None)
@given(family=families())
def test_structure_follows_from_the_paths(family: TreeFamily) -> None:
    for node, path in enumerate(family.paths, start=1):
        parent = family.parents[node]
        assert parent < node
        assert (family.paths[parent - 1] if parent else ()) == path[:-1]
        assert family.depths[node] == len(path)
        assert family.ranks[node] == path[-1]
        on_path = family.path_nodes[node]
        assert on_path[0] == 0 and on_path[-1] == node and on_path[-2] == parent
        assert {bit for bit in range(64) if family.ancestors[node] >> bit & 1} == set(on_path)


@settings(max_examples=50, deadline=None)
@given(family=families())
def test_every_prefix_is_a_family_with_the_same_structure(family: TreeFamily) -> None:
    for size in range(len(family.paths) + 1):
        prefix = family.prefix(size)
        assert prefix.parents == family.parents[: size + 1]
        assert prefix.ancestors == family.ancestors[: size + 1]
        assert prefix.path_nodes == family.path_nodes[: size + 1]


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (((0, 0),), "before its parent"),
        (((0,), (0,)), "repeated"),
        (((),), "empty"),
        (((-1,),), "negative"),
        (((0, 0), (0,)), "before its parent"),
        (tuple((rank,) for rank in range(64)), "at most 63"),
    ],
)
def test_lists_that_are_no_family_are_refused(paths: tuple[tuple[int, ...], ...], message: str) -> None:
    with pytest.raises(TreeError, match=message):
        TreeFamily(paths, (0.1,) * len(paths))


def test_gains_must_fit_the_paths() -> None:
    with pytest.raises(TreeError, match="1 paths but 2 gains"):
        TreeFamily(((0,),), (0.5, 0.4))


def test_saved_family_loads_as_the_same(tmp_path: Path) -> None:
    FAMILY.save(tmp_path / "tree.json", measured_on="held-out text")
    assert TreeFamily.load(tmp_path / "tree.json") == FAMILY


@pytest.mark.parametrize("text", ["", "{}", '{"paths": [[0]], "gains": [1, 2]}', '{"paths": 3, "gains": []}'])
def test_damaged_file_is_a_tree_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "tree.json").write_text(text)
    with pytest.raises(TreeError):
        TreeFamily.load(tmp_path / "tree.json")


def test_missing_file_is_a_tree_error(tmp_path: Path) -> None:
    with pytest.raises(TreeError, match=r"tree\.json"):
        TreeFamily.load(tmp_path / "tree.json")
