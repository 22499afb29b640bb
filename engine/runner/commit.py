"""What follows the verdict on a step's trees: accepted nodes move, and committed tokens come to the host.

The functions on the device need nothing but tensors and wait for nothing, so that a CUDA graph may hold them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.backends.backend import Backend
from engine.backends.kv_cache import KVCache
from engine.batch import PassResult
from engine.runner.sampler import token_logprobs
from engine.runner.step_input import CommitRows, StepInput
from trees.verify import DraftTrees


@dataclass(frozen=True)
class _Commitment:
    """What one request's tree has come to."""

    token_ids: list[int]  # accepted tokens, then the bonus token
    nodes: list[int]  # the node each was drawn at
    draft_depth: int  # how deep the tree reached


def compact(backend: Backend, cache: KVCache, commits: CommitRows, last: Tensor, trees: DraftTrees) -> None:
    """Move the K and V of accepted nodes to the logical positions that follow their root

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


def read_results(step: StepInput, packed: Tensor, logits: Tensor) -> list[PassResult]:
    """What each request of a pass gets. Waits for the device.

    packed: as `pack` makes it, on the host; logits: [num_nodes_total, vocab], before anything was done to
    them.
    """
    made = [_unpack(row, packed.shape[1]) for row in packed.tolist()]
    committed = [PassResult(m.token_ids, draft_depth=m.draft_depth) for m in made]
    _add_logprobs(step.commits, logits, made, committed)
    results = iter(committed)
    return [next(results) if s.commits else PassResult([]) for s in step.scheduled]


def _unpack(row: list[int], width: int) -> _Commitment:
    paths_end = 3 + (width - 3) // 2
    draft_depth, num_accepted, bonus_token = row[:3]
    path = row[paths_end + 1 : paths_end + num_accepted + 1]
    return _Commitment([*path, bonus_token], row[3 : 4 + num_accepted], draft_depth)


def _add_logprobs(
    commits: CommitRows, logits: Tensor, made: list[_Commitment], committed: list[PassResult]
) -> None:
    """Those of all requests that ask for them, in one transfer. logits: [num_nodes_total, vocab]."""
    rows: list[int] = []
    token_ids: list[int] = []
    num_top: list[int] = []
    asking = []
    for first, s, m, result in zip(commits.offsets, commits.scheduled, made, committed, strict=True):
        top = s.request.sampling.logprobs
        if top is not None:
            asking.append(result)
            rows += [first + node for node in m.nodes]
            token_ids += m.token_ids
            num_top += [top] * len(m.token_ids)
    if not asking:
        return
    found = iter(token_logprobs(logits[rows], token_ids, num_top))
    for result in asking:
        result.logprobs = [next(found) for _ in result.token_ids]
