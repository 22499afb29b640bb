"""The drafting interface: drafters propose, the tree verifies, the engine does not know which one guessed."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from heads.medusa import MedusaHeads
from trees.verify import TreeTables


class Drafter(Protocol):
    """Fills trees with guesses. It sees the committed root, so a guess may depend on the path before it."""

    def propose(self, hidden: Tensor, roots: Tensor, tree: TreeTables) -> Tensor:
        """Token ids of every node, [num_requests, num_nodes] int64, column 0 the roots themselves.

        hidden: [num_requests, hidden], the row the root was drawn from; roots: [num_requests] int64. The
        children of one node must differ.
        """
        ...


class HeadsDrafter:
    """Guesses of a head set that is bound to its base model."""

    def __init__(self, heads: MedusaHeads) -> None:
        self._heads = heads

    def propose(self, hidden: Tensor, roots: Tensor, tree: TreeTables) -> Tensor:
        return self._heads.fill_tree(hidden, roots, tree.parents, tree.depths, tree.ranks)
