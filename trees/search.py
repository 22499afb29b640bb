"""Finds the nested tree family that commits most tokens per step, from counts of rank paths that came true.

A path's gain is the share of positions at which every node on it was right. A path is never likelier than its
parent, so adding the path with the highest gain next is optimal for every tree size. Whole paths are counted,
and the hit rates of heads are not multiplied, because heads tend to be right together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from trees.family import MAX_DRAFT_NODES, RankPath, TreeFamily


def family_from_paths(observed: Iterable[RankPath], max_drafts: int = MAX_DRAFT_NODES) -> TreeFamily:
    """The best family for the paths that were observed at the positions of held-out text.

    observed: for each position the ranks of the true next tokens among the heads' guesses, cut before the
    first head that missed (so `()` where head 0 missed). Paths that never came true are left out, so that the
    family may be smaller than `max_drafts`.
    """
    hits: Counter[RankPath] = Counter()
    positions = 0
    for path in observed:
        positions += 1
        hits.update(path[:depth] for depth in range(1, len(path) + 1))
    # A parent is hit at least as often as its child and is shorter, so this order puts it first.
    best = sorted(hits, key=lambda path: (-hits[path], len(path), path))[:max_drafts]
    return TreeFamily(tuple(best), tuple(hits[path] / positions for path in best))


def accepted_nodes(family: TreeFamily, path: RankPath) -> int:
    """How many draft tokens of the family's tree are accepted where the true next tokens have these ranks."""
    nodes = set(family.paths)
    return next((depth for depth in range(len(path)) if path[: depth + 1] not in nodes), len(path))
