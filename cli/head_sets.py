"""Head sets by the names that commands take, whole and checked."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from heads.checkpoint import HeadSet
    from trees.family import TreeFamily


def load_whole(folder: Path) -> tuple[HeadSet, TreeFamily]:
    """A head set and its tree. Raises HeadsError or TreeError where one is damaged or they do not fit."""
    from heads.checkpoint import load_heads
    from heads.errors import HeadsError
    from trees.family import TreeFamily

    heads = load_heads(folder)
    family = TreeFamily.load(folder / "tree.json")
    if family.max_depth > heads.module.num_heads:
        raise HeadsError(
            f"tree.json is {family.max_depth} deep, but the set has {heads.module.num_heads} heads"
        )
    if max(family.ranks) >= heads.module.num_tokens:
        raise HeadsError(
            f"tree.json asks for guess {max(family.ranks) + 1} of a head, but the set knows "
            f"{heads.module.num_tokens} tokens"
        )
    return heads, family


def find_heads(name: str) -> Path:
    """The folder of a head set by name, folder or hub id. Raises RegistryError."""
    from heads.errors import RegistryError
    from heads.registry import ResolvedModel, resolve_heads

    # Without a model "auto" finds nothing; every other way to name a set does not depend on one.
    folder = resolve_heads(name, ResolvedModel("", Path()))
    if folder is None:
        raise RegistryError(f"{name!r} names no head set; see: gorgon heads list")
    return folder
