"""What `gorgon evaluate` compares: engines that differ in who guesses and how much, by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from engine.answering import EngineMode
from engine.config import EngineConfig
from engine.errors import ConfigError
from trees.family import TreeFamily

DRAFT_SIZES = (4, 8, 16, 32, 63)
OFF = "off"


def tree_sizes(asked: Sequence[int] | None, family: TreeFamily) -> list[int]:
    """Sizes of fixed trees in draft nodes: those asked for, or the usual ones that the family has.

    Raises ConfigError for a size that the family does not have.
    """
    held = len(family.paths)
    if asked is None:
        return [nodes for nodes in DRAFT_SIZES if nodes <= held]
    for nodes in asked:
        if not 1 <= nodes <= held:
            raise ConfigError(
                "draft_tokens",
                f"must be 1 to {held}, the head set's tree within --max-tree-nodes, not {nodes}",
            )
    return sorted(set(asked))


def make_modes(config: EngineConfig, sizes: Sequence[int]) -> list[EngineMode]:
    """One engine for each mode, off first. config: with the head set.

    A tree of fixed size is the heads' own; the largest is grown with n-grams as well.
    """
    from engine.build import build

    return [
        EngineMode(OFF, build(replace(config, speculation="off"))),
        EngineMode("auto", build(config)),
        *(EngineMode(f"tree:{nodes}", build(config, fixed_drafts=nodes, ngrams=False)) for nodes in sizes),
        *(EngineMode(f"merged:{nodes}", build(config, fixed_drafts=nodes)) for nodes in sizes[-1:]),
    ]


def nodes_of(mode: str) -> int | None:
    """Draft nodes of a fixed tree's mode, None for any other."""
    kind, _, nodes = mode.partition(":")
    return int(nodes) if kind == "tree" else None
