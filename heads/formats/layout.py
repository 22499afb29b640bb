"""What all checkpoint layouts of Medusa heads have in common: a key of the file is a place in the heads.

A layout translates between the two in both directions, and says what its project allows a file to leave out.
Nothing here reads a file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Place:
    """Where a tensor belongs. `head` and `layer` are 0 where the part has none."""

    part: Literal["weight", "bias", "projection", "token_map"]
    head: int = 0
    layer: int = 0  # of a projection: the number of blocks before it, 0 where the key does not tell


def _never(config: Config) -> bool:
    return False


@dataclass(frozen=True)
class Layout:
    """One family of checkpoints. The predicates read its config.json, {} where there is none."""

    name: str
    parse: Callable[[str], Place | None]  # a key's place, None for a key that is no head's
    key: Callable[[Place], str]
    is_base: Callable[[str], bool]  # whether a key belongs to a base model merged into the file
    counts: Mapping[str, Sequence[str]]  # config.json's names of "heads" and "layers"
    believes_config: bool  # its loader uses config.json's sizes, so a wrong size there is an error
    trains_base: bool = False  # the base in the file was trained together with the heads
    numbers_projection: bool = False  # the projection's key tells how many blocks come before it
    may_lack_biases: Callable[[Config], bool] = _never
    may_share: Callable[[Config], bool] = _never  # no projection means the base's
    one_projection: Callable[[Config], bool] = _never  # the first head's serves all
