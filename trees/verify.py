"""Which path of each tree to keep: pure functions on small tensors, batched over requests.

All requests of a step use one nested family, so that a tree is a prefix of the family's node list and the
tables below serve every request. The walk goes by node; short trees are told apart by a mask, never by a
padding token, since every token id is a real one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trees.family import TreeFamily


@dataclass(frozen=True)
class TreeTables:
    """A family's structure on the device. Node 0 is the root, nodes follow in the family's order."""

    parents: Tensor  # [num_nodes] int64, the root's is itself
    depths: Tensor  # [num_nodes] int64
    ranks: Tensor  # [num_nodes] int64
    paths: Tensor  # [num_nodes, max_depth + 1] int64: nodes from the root to the node, then the node repeated

    @classmethod
    def build(cls, family: TreeFamily, device: torch.device) -> TreeTables:
        paths = [[*path, *[path[-1]] * (family.max_depth + 1 - len(path))] for path in family.path_nodes]
        return cls(
            parents=torch.tensor(family.parents, device=device),
            depths=torch.tensor(family.depths, device=device),
            ranks=torch.tensor(family.ranks, device=device),
            paths=torch.tensor(paths, device=device),
        )

    def prefix(self, num_nodes: int) -> TreeTables:
        """The tables of the family's first `num_nodes` nodes, root included."""
        return TreeTables(
            self.parents[:num_nodes],
            self.depths[:num_nodes],
            self.ranks[:num_nodes],
            self.paths[:num_nodes, :num_nodes],  # no path is longer than the tree has nodes
        )


def exact_edges(tokens: Tensor, targets: Tensor, tables: TreeTables) -> Tensor:
    """Whether each node is the token its parent's target asks for, [num_requests, num_nodes] bool.

    tokens, targets: [num_requests, num_nodes] int64. The root's own entry means nothing.
    """
    return tokens == targets[:, tables.parents]


def deepest_accepted(edges: Tensor, num_nodes: Tensor, tables: TreeTables) -> Tensor:
    """The deepest node of each tree whose whole path from the root is accepted, [num_requests] int64.

    edges: [num_requests, num_nodes] bool, whether a node may follow its parent; num_nodes: [num_requests]
    int64, root included. Of two equally deep nodes the earlier one wins.
    """
    width = edges.shape[1]
    accepted = edges & (torch.arange(width, device=edges.device) < num_nodes.unsqueeze(1))
    accepted[:, 0] = True
    own = accepted
    for _ in range(tables.paths.shape[1] - 1):
        accepted = own & accepted[:, tables.parents]
    # argmax returns the first of several maxima
    return torch.where(accepted, tables.depths, -1).argmax(dim=1)
