"""A nested family of draft trees: one ordered list of nodes whose first n form the tree of size n.

Plain Python, so that the scheduler may use it. Nodes are named by rank path: (0,) is the likeliest guess of
the first head, (0, 2) the third guess of the second head below it. The root, the committed token the tree
hangs on, is node 0 and not listed; draft node i of `paths` is tree node i + 1.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

MAX_DRAFT_NODES = 63  # 64 with the root: a node's ancestors are one 64-bit set

RankPath = tuple[int, ...]


class TreeError(ValueError):
    """A list of paths that is no nested family of trees."""


@dataclass(frozen=True)
class TreeFamily:
    """`paths` in order of falling gain, each after its parent; `gains[i]` is the calibrated probability
    that draft node i is accepted, so that the tree of size n commits 1 + sum(gains[:n]) tokens a step."""

    paths: tuple[RankPath, ...]
    gains: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.paths) != len(self.gains):
            raise TreeError(f"{len(self.paths)} paths but {len(self.gains)} gains")
        if len(self.paths) > MAX_DRAFT_NODES:
            raise TreeError(f"{len(self.paths)} nodes; a tree has at most {MAX_DRAFT_NODES} besides its root")
        if not all(0.0 <= gain <= 1.0 for gain in self.gains):  # NaN is neither
            raise TreeError("gains must be probabilities, 0 to 1")
        seen: set[RankPath] = {()}
        for path in self.paths:
            if path in seen or not path or min(path) < 0:
                raise TreeError(f"path {list(path)} is empty, repeated or has a negative rank")
            if path[:-1] not in seen:
                raise TreeError(f"path {list(path)} comes before its parent {list(path[:-1])}")
            seen.add(path)

    @cached_property
    def parents(self) -> tuple[int, ...]:
        """Tree node of each node's parent, [num_nodes] with the root first (its own parent)."""
        index = {path: i for i, path in enumerate(((), *self.paths))}
        return (0, *(index[path[:-1]] for path in self.paths))

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Depth of each tree node, [num_nodes], the root 0."""
        return (0, *(len(path) for path in self.paths))

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """Rank of each tree node among its head's guesses, [num_nodes]; the root's is 0 and means nothing."""
        return (0, *(path[-1] for path in self.paths))

    @cached_property
    def ancestors(self) -> tuple[int, ...]:
        """Bit set of the tree nodes each node sees, itself included, [num_nodes]."""
        return tuple(sum(1 << node for node in path) for path in self.path_nodes)

    @cached_property
    def path_nodes(self) -> tuple[tuple[int, ...], ...]:
        """Tree nodes from the root to each node, both included, [num_nodes]."""
        paths: list[tuple[int, ...]] = [(0,)]
        for node in range(1, len(self.parents)):
            paths.append((*paths[self.parents[node]], node))
        return tuple(paths)

    @property
    def max_depth(self) -> int:
        return max(self.depths)

    def prefix(self, num_drafts: int) -> TreeFamily:
        """The family cut to its first `num_drafts` nodes."""
        return TreeFamily(self.paths[:num_drafts], self.gains[:num_drafts])

    def save(self, path: Path, **facts: object) -> None:
        """Write tree.json; `facts` (hit rates, where they were measured) go beside the nodes."""
        document = {"version": 1, "paths": self.paths, "gains": [round(g, 6) for g in self.gains], **facts}
        path.write_text(json.dumps(document, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> TreeFamily:
        """Read tree.json. Raises TreeError where it is none."""
        try:
            document = json.loads(path.read_text())
            paths = tuple(tuple(int(rank) for rank in nodes) for nodes in document["paths"])
            return cls(paths, tuple(float(gain) for gain in document["gains"]))
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise TreeError(f"{path.name} holds no tree family: {error}") from error
