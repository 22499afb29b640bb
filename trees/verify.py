"""Which path of each tree to keep: pure functions on small tensors, batched over requests.

The tree of every request has its own shape, given by its nodes' parents. The walk goes by node. The number of
nodes tells short trees apart, never a padding token, because every token id is a real one.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DraftTrees:
    """The filled trees of a step. Node 0 of each is its root. Entries past `num_nodes` mean nothing."""

    tokens: Tensor  # [num_requests, max_nodes] int64
    parents: Tensor  # [num_requests, max_nodes] int64, the root's is itself
    num_nodes: Tensor  # [num_requests] int64, root included
    depths: Tensor  # [num_requests, max_nodes] int64, the root's 0
    ancestors: Tensor  # [num_requests, max_nodes] int64 bit sets of the nodes each sees, itself included
    paths: Tensor  # [num_requests, max_nodes, depth + 1] int64: from the root to the node, then it repeated

    @classmethod
    def build(cls, tokens: Tensor, parents: Tensor, num_nodes: Tensor, max_depth: int) -> DraftTrees:
        """Derive depths, ancestors and paths from the parents, without reading a tensor on the host.

        tokens, parents: [num_requests, max_nodes] int64, column 0 the roots, each node after its parent;
        num_nodes: [num_requests] int64; max_depth: no node lies deeper.
        """
        requests, width = parents.shape
        max_depth = min(max_depth, width - 1)
        if width == 1:  # the root alone, as in every step without drafts
            alone = torch.zeros_like(parents)
            return cls(tokens, parents, num_nodes, alone, alone + 1, alone.unsqueeze(2))
        nodes = torch.arange(width, device=parents.device)
        # chains[..., i] is the i-th node on the way up; past the root, the root repeats. Each round doubles
        # the length: the second half of a path is the path of the node halfway up.
        chains = nodes.expand(requests, width).unsqueeze(2)
        jumps = parents
        while chains.shape[2] <= max_depth:
            above = jumps.unsqueeze(2).expand_as(chains)
            chains = torch.cat((chains, chains.gather(1, above)), dim=2)
            jumps = jumps.gather(1, jumps)
        chains = chains[:, :, : max_depth + 1]
        below_root = chains > 0
        depths = below_root.sum(dim=2)
        # The nodes of a path differ, so that the sum of their bits is their union. The root is in every set.
        bits = torch.bitwise_left_shift(below_root.long(), chains)
        up = depths.unsqueeze(2) - torch.arange(max_depth + 1, device=parents.device)
        return cls(
            tokens=tokens,
            parents=parents,
            num_nodes=num_nodes,
            depths=depths,
            ancestors=bits.sum(dim=2) + 1,
            paths=chains.gather(2, up.clamp_(min=0)),
        )

    def first(self, num_requests: int) -> DraftTrees:
        """The trees of the first requests."""
        return DraftTrees(*(getattr(self, field.name)[:num_requests] for field in dataclasses.fields(self)))

    @property
    def tree_depths(self) -> Tensor:
        """Depth of each request's tree, [num_requests] int64."""
        inside = torch.arange(self.parents.shape[1], device=self.parents.device) < self.num_nodes.unsqueeze(1)
        return self.depths.masked_fill(~inside, 0).amax(dim=1)

    def paths_to(self, nodes: Tensor) -> Tensor:
        """The path to one node of each request, [num_requests, depth + 1]; nodes: [num_requests] int64."""
        return self.paths[torch.arange(len(nodes), device=nodes.device), nodes]


def exact_edges(targets: Tensor, trees: DraftTrees) -> Tensor:
    """Whether each node is the token its parent's target asks for, [num_requests, max_nodes] bool.

    targets: [num_requests, max_nodes] int64. The root's own entry means nothing.
    """
    return trees.tokens == targets.gather(1, trees.parents)


def deepest_accepted(edges: Tensor, trees: DraftTrees) -> Tensor:
    """The deepest node of each tree whose whole path from the root is accepted, [num_requests] int64.

    edges: [num_requests, max_nodes] bool, whether a node may follow its parent. Of two equally deep nodes
    the earlier one wins.
    """
    width = edges.shape[1]
    if width == 1:
        return torch.zeros(len(edges), dtype=torch.int64, device=edges.device)
    accepted = edges & (torch.arange(width, device=edges.device) < trees.num_nodes.unsqueeze(1))
    accepted[:, 0] = True
    on_path = accepted.unsqueeze(1).expand(-1, width, -1).gather(2, trees.paths)
    # argmax returns the first of several maxima
    return trees.depths.masked_fill(~on_path.all(dim=2), -1).argmax(dim=1)
