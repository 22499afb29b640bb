"""Random tree families for property tests. Without torch."""

from __future__ import annotations

from hypothesis import strategies as st

from trees.family import MAX_DRAFT_NODES, RankPath, TreeFamily


@st.composite
def families(draw: st.DrawFn, max_nodes: int = 24, max_rank: int = 3, max_depth: int = 8) -> TreeFamily:
    """A nested family of up to `max_nodes` draft nodes in any valid order, gains falling."""
    size = draw(st.integers(0, min(max_nodes, MAX_DRAFT_NODES)))
    paths: list[RankPath] = []
    for _ in range(size):
        known = [(), *paths]
        offers = [
            (*parent, rank)
            for parent in known
            if len(parent) < max_depth
            for rank in range(max_rank + 1)
            if (*parent, rank) not in paths
        ]
        paths.append(draw(st.sampled_from(offers)))
    return TreeFamily(tuple(paths), tuple(0.8 ** (i + 1) for i in range(size)))


def chain(length: int) -> TreeFamily:
    """One node per depth."""
    return TreeFamily(tuple((0,) * d for d in range(1, length + 1)), (0.5,) * length)


def full(num_nodes: int = MAX_DRAFT_NODES, width: int = 3, depth: int = 5) -> TreeFamily:
    """Breadth first, `width` children a node: the shape with most siblings."""
    paths: list[RankPath] = []
    level: list[RankPath] = [()]
    for _ in range(depth):
        level = [(*parent, rank) for parent in level for rank in range(width)]
        paths += level
    paths = paths[:num_nodes]
    return TreeFamily(tuple(paths), tuple(0.9 ** (i + 1) for i in range(len(paths))))
