"""Loads a head set with its tree and checks that the two fit each other."""

from __future__ import annotations

from pathlib import Path

from heads.checkpoint import HeadSet, load_heads
from heads.errors import HeadsError
from trees.family import TreeFamily


def load_head_set(folder: Path) -> tuple[HeadSet, TreeFamily]:
    """A head set and its tree. Raises HeadsError or TreeError where one is damaged or they do not fit."""
    heads = load_heads(folder)
    family = TreeFamily.load(folder / "tree.json")
    module, num_tokens = heads.module, heads.module.num_tokens
    again = "run gorgon calibrate on this head set to make its tree anew"
    if family.max_depth > module.num_heads:
        raise HeadsError(
            f"the tree of head set {heads.name} is {family.max_depth} deep, but it has {module.num_heads} "
            f"heads; {again}"
        )
    if max(family.ranks) >= num_tokens:
        raise HeadsError(
            f"the tree of head set {heads.name} asks for guess {max(family.ranks) + 1} of a head, but its "
            f"heads know {num_tokens} tokens; {again}"
        )
    return heads, family
