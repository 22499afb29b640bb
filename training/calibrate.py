"""Measures a head set on held-out text: hit rates by rank, the best trees, tokens per step by tree size.

Ranks are measured along the true path: a head that sees its path gets what it gets at serving when every
guess before was right. A hit rate does not say whether those guesses were right, and heads tend to be right
together. So trees are made from counts of whole paths.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import prod

import torch
from torch import Tensor

from heads.base import DraftHeads
from training.sequences import SequenceBatch, Sequences
from trees.family import RankPath, TreeFamily
from trees.search import accepted_nodes, family_from_paths

MAX_RANK = 40  # a true token of a higher rank counts as a miss
SHOWN_RANKS = 10
TOKENS_PER_PASS = 1024
MAX_TASKS = 30  # shown by themselves; a source of its own for every row would tell nothing
TREE_SIZES = (1, 2, 4, 8, 16, 32, 63)


@dataclass(frozen=True)
class Rates:
    """What was measured on some answers.

    `hit_rates[k][r]` is how often head k's guess of rank r is right where its path so far is the true one,
    for MAX_RANK ranks.
    """

    num_positions: int
    hit_rates: list[list[float]]
    tokens_per_step: dict[int, float]  # by nodes besides the root, over the steps of a walk through the text

    def facts(self) -> dict[str, object]:
        """As plain data, rounded."""
        return {
            "positions": self.num_positions,
            "hit_rates": [[round(rate, 4) for rate in rates[:SHOWN_RANKS]] for rates in self.hit_rates],
            "tokens_per_step": {str(n): round(tokens, 3) for n, tokens in self.tokens_per_step.items()},
        }


@dataclass(frozen=True)
class Calibration(Rates):
    """Rates over all answers, the tree family that they give, and the rates of single tasks.

    Tasks with most positions come first. There are none where the text names no tasks.
    """

    family: TreeFamily
    by_task: dict[str, Rates]

    def facts(self) -> dict[str, object]:
        """What goes into tree.json beside the tree."""
        tasks = {name: rates.facts() for name, rates in self.by_task.items()}
        return super().facts() | ({"by_task": tasks} if tasks else {})

    def conditional(self) -> list[float]:
        """For each node of the family, how often it is right where its parent is, [num_paths]."""
        gains = (1.0, *self.family.gains)
        parents = self.family.parents[1:]
        return [
            gain / gains[parent] if gains[parent] else 0.0
            for gain, parent in zip(gains[1:], parents, strict=True)
        ]

    def independent(self) -> list[float]:
        """For each node of the family, how often it would be accepted if heads were right independently of
        each other: the product of their hit rates along its path, [num_paths]."""
        return [prod(self.hit_rates[k][rank] for k, rank in enumerate(path)) for path in self.family.paths]


@dataclass(frozen=True)
class _Answer:
    """One answer's positions: `ranks` as of `true_ranks`, `known` where the head has a target at all, both
    [num_positions, num_heads]."""

    task: str
    ranks: Tensor
    known: Tensor
    paths: list[RankPath]


@torch.inference_mode()
def true_ranks(heads: DraftHeads, batch: SequenceBatch, embedding: Tensor) -> Tensor:
    """Rank of the true token among each head's guesses where everything before it was guessed right,
    [num_anchors, num_heads] int64; MAX_RANK for a miss.

    heads: bound; embedding: [vocab, hidden], the base's; all of them on one device.
    """
    dtype = next(heads.parameters()).dtype
    rows = embedding[batch.token_ids].to(dtype)
    shape = len(batch.anchors), heads.num_heads
    ranks = torch.full(shape, MAX_RANK, dtype=torch.int64, device=rows.device)
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
    """Tokens per step when every segment is decoded from its start.

    Unlike a mean over positions, this does not count the positions that a long step jumps over.
    """
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
    heads: DraftHeads,
    sequences: Sequences,
    documents: Sequence[int],
    embedding: Tensor,
    tasks: Sequence[str] = (),
) -> Calibration:
    """Measure bound heads on the answers of the given documents, on the device of the heads.

    embedding: [vocab, hidden], the base's, on that device too; tasks: of all documents of the
    sequences, by number.
    """
    answers: list[_Answer] = []
    for numbers in sequences.batches(documents, TOKENS_PER_PASS):
        answers += _measure(
            heads, sequences.load(numbers), embedding, [tasks[n] for n in numbers] if tasks else []
        )
    family = family_from_paths(path for answer in answers for path in answer.paths)
    by_task: dict[str, list[_Answer]] = {}
    for answer in answers:
        by_task.setdefault(answer.task, []).append(answer)
    rates = {name: _rates(family, of_task) for name, of_task in by_task.items() if len(by_task) > 1}
    most = sorted(rates, key=lambda name: (-rates[name].num_positions, name))[:MAX_TASKS]
    over_all = _rates(family, answers)
    return Calibration(
        over_all.num_positions,
        over_all.hit_rates,
        over_all.tokens_per_step,
        family,
        {name: rates[name] for name in most},
    )


def _measure(
    heads: DraftHeads, batch: SequenceBatch, embedding: Tensor, tasks: Sequence[str]
) -> Iterator[_Answer]:
    """The answers of a batch, counted on the CPU. tasks: by row of the batch, or none."""
    ranks = true_ranks(heads, batch.to(embedding.device), embedding).cpu()
    known = torch.stack([batch.targets(k) >= 0 for k in range(heads.num_heads)], dim=1)
    rows = (batch.anchors // batch.token_ids.shape[1]).tolist()
    first = 0
    for _, group in groupby(batch.ends.tolist()):  # the anchors of one answer lie together
        end = first + len(list(group))
        task = tasks[rows[first]] if tasks else ""
        yield _Answer(task, ranks[first:end], known[first:end], rank_paths(ranks[first:end]))
        first = end


def _rates(family: TreeFamily, answers: Sequence[_Answer]) -> Rates:
    ranks, known = (torch.cat([getattr(a, name) for a in answers]) for name in ("ranks", "known"))
    hit_rates = []
    for column, mask in zip(ranks.t(), known.t(), strict=True):
        counts = torch.bincount(column[mask], minlength=MAX_RANK + 1)[:MAX_RANK]
        hit_rates.append((counts / mask.sum().clamp(min=1)).tolist())
    sizes = sorted({min(size, len(family.paths)) for size in TREE_SIZES})
    paths = [answer.paths for answer in answers]
    return Rates(len(ranks), hit_rates, {size: walk(family.prefix(size), paths) for size in sizes})
