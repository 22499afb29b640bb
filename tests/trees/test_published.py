"""The default tree follows the published hit rates and is the best of its size under independence."""

from __future__ import annotations

import itertools
import math

import pytest

from trees.family import MAX_DRAFT_NODES
from trees.published import TOP_1, TOP_5, independent_family, published_family


def test_the_published_rates_are_met() -> None:
    family = published_family(5, 1000)
    gains = dict(zip(family.paths, family.gains, strict=True))
    assert len(family.paths) == MAX_DRAFT_NODES
    assert gains[(0,)] == TOP_1[0]
    assert sum(gains[(rank,)] for rank in range(5)) == pytest.approx(TOP_5[0])
    assert gains[(0, 0)] == pytest.approx(TOP_1[0] * TOP_1[1])
    assert max(rank for path in family.paths for rank in path) < 10


@pytest.mark.parametrize("size", [1, 4, 9])
def test_no_tree_of_the_size_gains_more(size: int) -> None:
    """Against every path there is: the likeliest `size` of them always form a tree."""
    rates = [[0.5, 0.2, 0.1], [0.4, 0.3, 0.05], [0.3, 0.2, 0.1]]
    products = [
        math.prod(rates[depth][rank] for depth, rank in enumerate(path))
        for length in (1, 2, 3)
        for path in itertools.product(range(3), repeat=length)
    ]
    assert sum(independent_family(rates, size).gains) == pytest.approx(sum(sorted(products)[-size:]))


@pytest.mark.parametrize(("num_heads", "depth"), [(1, 1), (2, 2), (9, 5)])
def test_the_tree_is_no_deeper_than_the_heads_or_what_was_published(num_heads: int, depth: int) -> None:
    assert published_family(num_heads, 1000).max_depth <= depth


def test_few_tokens_limit_the_ranks() -> None:
    assert max(published_family(3, 2).ranks) == 1
