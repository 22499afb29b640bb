"""Measures a head set on held-out text: hit rates by rank, the best trees, tokens per step by tree size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from heads.base import DraftHeads
from training.sequences import SequenceBatch, Sequences
from trees.family import RankPath, TreeFamily
from trees.search import accepted_nodes, family_from_paths

MAX_RANK = 40  # a true token beyond counts as a miss
SHOWN_RANKS = 10
TOKENS_PER_PASS = 1024
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
def true_ranks(heads: DraftHeads, batch: SequenceBatch, embedding: Tensor) -> Tensor:
    """Rank of the true token among each head's guesses where everything before it was guessed right,
    [num_anchors, num_heads] int64; MAX_RANK for a miss.

    heads: bound; embedding: [vocab, hidden], the base's.
    """
    dtype = next(heads.parameters()).dtype
    rows = embedding[batch.token_ids].to(dtype)
    ranks = torch.full((len(batch.anchors), heads.num_heads), MAX_RANK, dtype=torch.int64)
    for head, features in enumerate(heads.sequence_features(batch.hidden.to(dtype), rows, batch.anchors)):
        logits = heads.head_logits(head, features)
        guesses = logits.topk(min(MAX_RANK, logits.shape[-1]), dim=-1).indices  # [num_anchors, MAX_RANK]
        if heads.token_map is not None:
            guesses = heads.token_map[guesses]
        right = guesses == batch.targets(head).unsqueeze(1)
        ranks[:, head] = torch.where(right.any(dim=1), right.int().argmax(dim=1), MAX_RANK)
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
    heads: DraftHeads, sequences: Sequences, documents: Sequence[int], embedding: Tensor
) -> Calibration:
    """Measure bound heads on the answers of the given documents. embedding: [vocab, hidden], the base's."""
    by_answer: list[list[RankPath]] = []
    all_ranks, all_known = [], []
    for numbers in sequences.batches(documents, TOKENS_PER_PASS):
        batch = sequences.load(numbers)
        ranks = true_ranks(heads, batch, embedding)
        all_ranks.append(ranks)
        all_known.append(torch.stack([batch.targets(k) >= 0 for k in range(heads.num_heads)], dim=1))
        # The anchors of one answer lie together.
        lengths = [len(list(group)) for _, group in groupby(batch.ends.tolist())]
        by_answer += [rank_paths(rows) for rows in torch.split(ranks, lengths)]
    ranks, known = torch.cat(all_ranks), torch.cat(all_known)
    family = family_from_paths(path for paths in by_answer for path in paths)
    hit_rates = [
        [float((column[mask] == rank).float().mean()) for rank in range(SHOWN_RANKS)]
        for column, mask in zip(ranks.t(), known.t(), strict=True)
    ]
    sizes = sorted({min(size, len(family.paths)) for size in TREE_SIZES})
    tokens = {size: walk(family.prefix(size), by_answer) for size in sizes}
    return Calibration(family, hit_rates, tokens, len(ranks))
