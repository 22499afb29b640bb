"""Which nodes of a larger tree to keep, when a drafter has said how sure it is of each.

The calibrated family says which shape is best on average; the probabilities of one draft say which is best
here (EAGLE-2, arXiv 2406.16858, section 4, reranks its draft tree by the same product).
"""

from __future__ import annotations

import torch
from torch import Tensor


def likeliest_nodes(
    log_probs: Tensor, parents: Tensor, max_depth: int, num_nodes: Tensor, max_nodes: int
) -> tuple[Tensor, Tensor]:
    """Keep the nodes with the highest product of probabilities along their paths.

    log_probs: [num_requests, num_offered] float32, of each node given its parent, at most 0, the root's 0;
    parents: [num_offered] int64, the tree all are taken from, each node after its parent; max_depth: no node
    lies deeper; num_nodes: [num_requests] int64, how many to keep, root included; max_nodes: the largest.

    Returns the kept nodes in their old order and each one's parent among them, both [num_requests,
    max_nodes] int64. What lies past num_nodes repeats the root.
    """
    paths = log_probs
    for _ in range(max_depth - 1):
        paths = log_probs + paths.index_select(1, parents)
    # No path is likelier than its parent's, not even rounded, and ties go to the earlier node: the best n
    # nodes are a tree for every n.
    order = paths.sort(dim=1, descending=True, stable=True).indices[:, :max_nodes]
    kept = torch.arange(max_nodes, device=order.device) < num_nodes.unsqueeze(1)
    offered = len(parents)
    nodes = torch.where(kept, order, offered).sort(dim=1).values
    places = torch.zeros(len(nodes), offered + 1, dtype=torch.int64, device=nodes.device)
    places.scatter_(1, nodes, torch.arange(max_nodes, device=nodes.device).expand_as(nodes))
    nodes = torch.where(kept, nodes, 0)
    return nodes, places.gather(1, parents[nodes])
