"""Calibration: ranks of the true tokens, and tokens per step as a walk through the text counts them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from heads.medusa import MedusaHeads
from tests.training.tiny import tiny_decoder
from training.calibrate import MAX_RANK, calibrate, rank_paths, true_ranks, walk
from training.dataset import Document
from training.hidden_states import extract
from training.sequences import SequenceBatch, Sequences
from trees.family import TreeFamily

HIDDEN = 8
EMBEDDING = torch.eye(HIDDEN)


def sequence(hidden: torch.Tensor, tokens: list[int]) -> SequenceBatch:
    """One text, all of which is an answer but its first token."""
    length = len(tokens)
    anchors = torch.arange(length - 2)
    return SequenceBatch(
        hidden.unsqueeze(0), torch.tensor([tokens]), anchors, torch.full_like(anchors, length)
    )


def known_heads(token_map: torch.Tensor | None = None) -> MedusaHeads:
    """Two fresh heads over an identity projection: the hidden row itself ranks the tokens."""
    heads = MedusaHeads(2, 1, HIDDEN, HIDDEN, token_map)
    heads.bind(torch.eye(HIDDEN), torch.eye(HIDDEN))
    return heads


def test_ranks_are_places_in_the_order_of_the_guesses() -> None:
    hidden = torch.tensor([[8.0, 7, 6, 5, 4, 3, 2, 1]]).repeat(4, 1)
    ranks = true_ranks(known_heads(), sequence(hidden, [5, 5, 0, 3]), EMBEDDING)
    assert ranks.tolist() == [[0, 3], [3, MAX_RANK]]


def test_no_target_and_a_token_outside_the_map_are_misses() -> None:
    hidden = torch.tensor([[8.0, 7, 6, 5, 4, 3, 2, 1]]).repeat(4, 1)
    ranks = true_ranks(known_heads(torch.tensor([1, 3, 6])), sequence(hidden, [5, 5, 0, 6]), EMBEDDING)
    assert ranks.tolist() == [[MAX_RANK, 2], [2, MAX_RANK]]


def test_paths_end_at_the_first_miss() -> None:
    ranks = torch.tensor([[0, 2], [MAX_RANK, 0], [1, MAX_RANK]])
    assert rank_paths(ranks) == [(0, 2), (), (1,)]


def test_a_walk_jumps_over_what_a_step_committed() -> None:
    family = TreeFamily(((0,), (0, 0)), (0.5, 0.3))
    # Steps at places 0 (three tokens), 3 (one), 4 (two) and 6 (one): the hits at 1 and 2 are never asked for.
    text = [(0, 0), (0, 0), (0,), (), (0,), (), ()]
    assert walk(family, [text]) == 7 / 4
    assert walk(family.prefix(0), [text]) == 1


def test_each_task_is_measured_by_itself(tmp_path: Path) -> None:
    # Token 3 follows itself, which is what the heads guess; 4 and 5 are not in their token map.
    right = [Document([3] * 11, [(1, 11)], greedy=True, held_out=True)] * 2
    wrong = [Document([4, 5] * 6, [(2, 8)], greedy=True, held_out=True)]
    cache = extract(tiny_decoder(), [*right, *wrong], tmp_path)
    rows = torch.nn.functional.one_hot(cache.token_ids, HIDDEN).bfloat16()
    sequences = Sequences(dataclasses.replace(cache, hidden=rows))
    heads = known_heads(torch.tensor([3, 6]))
    result = calibrate(heads, sequences, [0, 1, 2], EMBEDDING, ["yes", "yes", "no"])
    assert list(result.by_task) == ["yes", "no"]
    yes, no = result.by_task.values()
    assert (yes.num_positions, no.num_positions) == (18, 5)
    assert yes.hit_rates[0][0] == yes.hit_rates[1][0] == 1
    assert sum(no.hit_rates[0]) == sum(no.hit_rates[1]) == 0
    assert (yes.tokens_per_step[2], no.tokens_per_step[2]) == (3, 1)
    assert result.hit_rates[0][0] == pytest.approx(18 / 23)
    assert calibrate(heads, sequences, [0, 1, 2], EMBEDDING).by_task == {}


def test_calibration_of_perfect_heads_commits_a_token_per_head_and_one(tmp_path: Path) -> None:
    documents = [Document([3] * 11, [(1, 11)], greedy=True, held_out=True)] * 3
    cache = extract(tiny_decoder(), documents, tmp_path)
    rows = torch.nn.functional.one_hot(cache.token_ids, HIDDEN).bfloat16()
    sequences = Sequences(dataclasses.replace(cache, hidden=rows))
    result = calibrate(known_heads(), sequences, [0, 1, 2], EMBEDDING)
    assert result.hit_rates[0][0] == result.hit_rates[1][0] == 1
    assert result.family.paths[:2] == ((0,), (0, 0))
    assert result.tokens_per_step[2] == 3
    assert result.facts()["positions"] == 27
