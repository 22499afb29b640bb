"""Random tree families for property tests. Without torch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import prod

from hypothesis import strategies as st

from trees.family import MAX_DRAFT_NODES, RankPath, TreeFamily


@st.composite
def families(draw: st.DrawFn, max_drafts: int = 24, max_rank: int = 3, max_depth: int = 8) -> TreeFamily:
    """A nested family of up to `max_drafts` draft nodes in any valid order, gains falling."""
    size = draw(st.integers(0, min(max_drafts, MAX_DRAFT_NODES)))
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


def family_of_rates(hit_rates: Sequence[Sequence[float]]) -> TreeFamily:
    """The best family where heads are right independently: hit_rates[d][r] for rank r of head d."""
    ranks = [range(len(rates)) for rates in hit_rates]
    gains = {
        path: prod(hit_rates[d][rank] for d, rank in enumerate(path))
        for depth in range(1, len(ranks) + 1)
        for path in product(*ranks[:depth])
    }
    best = sorted(gains, key=lambda path: (-gains[path], len(path), path))[:MAX_DRAFT_NODES]
    return TreeFamily(tuple(best), tuple(gains[path] for path in best))
