"""Measures a head set on held-out text: hit rates by rank, the best trees, tokens per step by tree size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from heads.medusa import MedusaHeads
from trees.family import RankPath, TreeFamily
from trees.search import accepted_nodes, family_from_paths

MAX_RANK = 40  # a true token beyond counts as a miss
SHOWN_RANKS = 10
ROWS_PER_PASS = 512
TREE_SIZES = (1, 2, 4, 8, 16, 32, 63)


@dataclass(frozen=True)
class Calibration:
    """What was measured. `hit_rates[k][r]`: how often head k's guess of rank r is right."""

    family: TreeFamily
    hit_rates: list[list[float]]
    tokens_per_step: dict[int, float]  # by nodes besides the root, over the steps of a walk through the text
    num_positions: int

    def facts(self) -> dict[str, object]:
        """What goes into tree.json beside the tree."""
        return {
            "positions": self.num_positions,
            "hit_rates": [[round(rate, 4) for rate in rates] for rates in self.hit_rates],
            "tokens_per_step": {str(n): round(tokens, 3) for n, tokens in self.tokens_per_step.items()},
        }


@torch.inference_mode()
def true_ranks(heads: MedusaHeads, hidden: Tensor, roots: Tensor, targets: Tensor) -> Tensor:
    """Rank of the true token among each head's guesses, [num_rows, num_heads] int64; MAX_RANK for a miss.

    heads: bound; hidden: [num_rows, hidden]; roots: [num_rows] the token after each row; targets:
    [num_rows, num_heads] token ids, -1 for none.
    """
    ranks = torch.full(targets.shape, MAX_RANK, dtype=torch.int64)
    for begin in range(0, len(hidden), ROWS_PER_PASS):
        block = slice(begin, begin + ROWS_PER_PASS)
        logits = heads.logits(hidden[block].to(heads.biases[0].dtype), roots[block], heads.num_heads)
        guesses = logits.topk(min(MAX_RANK, logits.shape[-1]), dim=-1).indices  # [heads, rows, MAX_RANK]
        if heads.token_map is not None:
            guesses = heads.token_map[guesses]
        right = guesses == targets[block].t().unsqueeze(2)
        ranks[block] = torch.where(right.any(dim=2), right.int().argmax(dim=2), MAX_RANK).t()
    return ranks


def rank_paths(ranks: Tensor) -> list[RankPath]:
    """Rows of ranks [num_rows, num_heads], each cut before its first miss."""
    paths = []
    for row in ranks.tolist():
        depth = next((k for k, rank in enumerate(row) if rank >= MAX_RANK), len(row))
        paths.append(tuple(row[:depth]))
    return paths


def walk(family: TreeFamily, segments: Sequence[Sequence[RankPath]]) -> float:
    """Tokens per step when every segment is decoded from its start: unlike a mean over positions, this does
    not count the positions that a long step jumps over."""
    steps = tokens = 0
    for paths in segments:
        place = 0
        while place < len(paths):
            committed = 1 + accepted_nodes(family, paths[place])
            steps += 1
            tokens += committed
            place += committed
    return tokens / max(1, steps)


def calibrate(
    heads: MedusaHeads, hidden: Tensor, roots: Tensor, targets: Tensor, segments: Tensor
) -> Calibration:
    """Measure bound heads on the rows of the given segments.

    hidden: [num_rows, hidden]; roots: [num_rows]; targets: [num_rows, num_heads]; segments:
    [num_segments, 2] row ranges.
    """
    ranges = [(int(start), int(end)) for start, end in segments]
    rows = torch.cat([torch.arange(start, end) for start, end in ranges])
    ranks = true_ranks(heads, hidden[rows], roots[rows], targets[rows])
    paths = rank_paths(ranks)
    family = family_from_paths(paths)
    by_segment, begin = [], 0
    for start, end in ranges:
        by_segment.append(paths[begin : begin + end - start])
        begin += end - start
    known = targets[rows] >= 0
    hit_rates = [
        [float((column[mask] == rank).float().mean()) for rank in range(SHOWN_RANKS)]
        for column, mask in zip(ranks.t(), known.t(), strict=True)
    ]
    sizes = sorted({min(size, len(family.paths)) for size in TREE_SIZES})
    tokens = {size: walk(family.prefix(size), by_segment) for size in sizes}
    return Calibration(family, hit_rates, tokens, len(rows))
