"""A tree for heads that have not been measured here yet, so that they can be served before their calibration.

It is the best tree for the hit rates that the Medusa paper (arXiv 2401.10774) gives for the heads of Vicuna
7B. Other heads have other rates, so calibration replaces it.
"""

from __future__ import annotations

import heapq

from trees.family import MAX_DRAFT_NODES, RankPath, TreeFamily

# By head (the first one guesses the second next token): hit rate of its best guess, and of its best five.
TOP_1 = (0.56, 0.32, 0.20, 0.15, 0.12)
TOP_5 = (0.78, 0.56, 0.42, 0.34, 0.30)
MAX_RANKS = 10  # as in the published trees
SOURCE = (
    "not calibrated: searched in the published hit rates of Medusa heads on Vicuna 7B (arXiv 2401.10774), "
    "taking heads as independent and rates between top-1 and top-5 to fall as a power of the rank"
)


def published_family(num_heads: int, num_tokens: int) -> TreeFamily:
    """The default family for `num_heads` heads that tell `num_tokens` tokens apart.

    Heads beyond the published five are left out of it until they are measured.
    """
    ranks = min(num_tokens, MAX_RANKS)
    rates = [_rank_rates(top_1, top_5)[:ranks] for top_1, top_5 in zip(TOP_1, TOP_5, strict=True)]
    return independent_family(rates[:num_heads])


def independent_family(hit_rates: list[list[float]], max_drafts: int = MAX_DRAFT_NODES) -> TreeFamily:
    """The best family if the probability of a path is the product of its guesses' rates.

    hit_rates: for each head the rates of its guesses by rank, falling. Nodes are added best first: a node is
    never likelier than its parent or its elder sibling, so the next node is the likeliest of those that
    border on the tree.
    """
    paths: list[RankPath] = []
    gains: list[float] = []
    border: list[tuple[float, RankPath, float]] = [(-hit_rates[0][0], (0,), 1.0)]  # with the parent's gain
    while border and len(paths) < max_drafts:
        negative, path, parent_gain = heapq.heappop(border)
        paths.append(path)
        gains.append(-negative)
        depth, rank = len(path), path[-1] + 1
        if rank < len(hit_rates[depth - 1]):
            sibling = (*path[:-1], rank)
            heapq.heappush(border, (-parent_gain * hit_rates[depth - 1][rank], sibling, parent_gain))
        if depth < len(hit_rates):
            heapq.heappush(border, (negative * hit_rates[depth][0], (*path, 0), -negative))
    return TreeFamily(tuple(paths), tuple(gains))


def _rank_rates(top_1: float, top_5: float) -> list[float]:
    """Rates of single ranks, `top_1 * (rank + 1) ** -s`; s makes the first five add up to `top_5`."""
    low, high = 0.0, 10.0
    for _ in range(60):  # bisection down to the last bit
        middle = (low + high) / 2
        if top_1 * sum(rank**-middle for rank in range(1, 6)) > top_5:
            low = middle
        else:
            high = middle
    return [top_1 * rank**-high for rank in range(1, MAX_RANKS + 1)]
