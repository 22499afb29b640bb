"""What follows the verdict on a step's trees: accepted nodes move, and committed tokens come to the host.

The functions on the device need nothing but tensors and wait for nothing, so that a CUDA graph may hold them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.backends.backend import Backend
from engine.backends.kv_cache import KVCache
from engine.runner.step_input import CommitRows
from trees.verify import DraftTrees


@dataclass(frozen=True)
class Commitment:
    """What one request's tree has come to."""

    token_ids: list[int]  # accepted tokens, then the bonus token
    nodes: list[int]  # the node each was drawn at
    draft_depth: int  # how deep the tree reached


def compact(backend: Backend, cache: KVCache, commits: CommitRows, last: Tensor, trees: DraftTrees) -> None:
    """Move the K and V of accepted nodes to the logical positions base + 1, base + 2, ...

    last: [num_commits] int64, the deepest accepted node of each tree.
    """
    if commits.max_nodes == 1:
        return
    paths = trees.paths_to(last)  # [num_commits, depth + 1]
    order = torch.arange(paths.shape[1], device=paths.device)
    depths = trees.depths.gather(1, last.unsqueeze(1))
    # A node that already lies where it belongs, and the repeated tail of a path, stay: the tail would
    # otherwise write over positions the path has not earned.
    moves = (order <= depths) & (paths != order)
    destinations = commits.node_slots[:, : paths.shape[1]]
    sources = torch.where(moves, commits.node_slots.gather(1, paths), destinations)
    backend.move(cache, sources, destinations)


def pack(trees: DraftTrees, last: Tensor, targets: Tensor) -> Tensor:
    """All that the host has to know, for one transfer: [num_commits, 3 + 2 * (depth + 1)] int64.

    last: [num_commits] int64; targets: [num_commits, max_nodes] int64.
    """
    end, paths = last.unsqueeze(1), trees.paths_to(last)
    facts = (trees.tree_depths.unsqueeze(1), trees.depths.gather(1, end), targets.gather(1, end))
    return torch.cat((*facts, paths, trees.tokens.gather(1, paths)), dim=1)


def unpack(packed: Tensor) -> list[Commitment]:
    """Waits for the device. packed: as `pack` makes it."""
    paths_end = 3 + (packed.shape[1] - 3) // 2
    commitments = []
    for row in packed.tolist():
        draft_depth, num_accepted, bonus_token = row[:3]
        path = row[paths_end + 1 : paths_end + num_accepted + 1]
        commitments.append(Commitment([*path, bonus_token], row[3 : 4 + num_accepted], draft_depth))
    return commitments
