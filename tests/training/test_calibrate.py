"""Calibration: ranks of the true tokens, and tokens per step as a walk through the text counts them."""

from __future__ import annotations

import torch

from heads.medusa import MedusaHeads
from training.calibrate import MAX_RANK, calibrate, rank_paths, true_ranks, walk
from trees.family import TreeFamily

HIDDEN = 8
NO_ROOT = torch.tensor([0])  # these heads have no root input


def known_heads(token_map: torch.Tensor | None = None) -> MedusaHeads:
    """Two fresh heads over an identity projection: the hidden row itself ranks the tokens."""
    heads = MedusaHeads(2, 1, HIDDEN, HIDDEN, token_map)
    heads.bind(torch.eye(HIDDEN), torch.eye(HIDDEN))
    return heads


def test_ranks_are_places_in_the_order_of_the_guesses() -> None:
    hidden = torch.tensor([[8.0, 7, 6, 5, 4, 3, 2, 1]])
    assert true_ranks(known_heads(), hidden, NO_ROOT, torch.tensor([[0, 3]])).tolist() == [[0, 3]]


def test_no_target_and_a_token_outside_the_map_are_misses() -> None:
    hidden = torch.tensor([[8.0, 7, 6, 5, 4, 3, 2, 1]])
    heads = known_heads(torch.tensor([1, 3, 6]))
    assert true_ranks(heads, hidden, NO_ROOT, torch.tensor([[3, -1]])).tolist() == [[1, MAX_RANK]]
    assert true_ranks(heads, hidden, NO_ROOT, torch.tensor([[0, 6]])).tolist() == [[MAX_RANK, 2]]


def test_paths_end_at_the_first_miss() -> None:
    ranks = torch.tensor([[0, 2], [MAX_RANK, 0], [1, MAX_RANK]])
    assert rank_paths(ranks) == [(0, 2), (), (1,)]


def test_a_walk_jumps_over_what_a_step_committed() -> None:
    family = TreeFamily(((0,), (0, 0)), (0.5, 0.3))
    # Steps at places 0 (three tokens), 3 (one), 4 (two) and 6 (one): the hits at 1 and 2 are never asked for.
    text = [(0, 0), (0, 0), (0,), (), (0,), (), ()]
    assert walk(family, [text]) == 7 / 4
    assert walk(family.prefix(0), [text]) == 1


def test_calibration_of_perfect_heads_commits_a_token_per_head_and_one() -> None:
    tokens = torch.tensor([3] * 9)
    hidden = torch.nn.functional.one_hot(tokens, HIDDEN).float()
    targets = torch.full((9, 2), 3)
    targets[-1], targets[-2, 1] = -1, -1
    result = calibrate(
        known_heads(), hidden, torch.zeros(len(hidden), dtype=torch.int64), targets, torch.tensor([[0, 9]])
    )
    assert result.hit_rates[0][0] == result.hit_rates[1][0] == 1
    assert result.family.paths[:2] == ((0,), (0, 0))
    assert result.tokens_per_step[2] == 3
    assert result.facts()["positions"] == 9
