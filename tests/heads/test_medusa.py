"""Medusa heads: the batched pass equals the formula, and a filled tree holds the guesses it should."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from heads.base import ProjectionKind
from heads.errors import HeadsError
from heads.medusa import MedusaHeads

HEADS, LAYERS, HIDDEN, VOCAB, RANK = 3, 2, 16, 40, 5


def random_heads(
    token_map: Tensor | None = None, projection: ProjectionKind = "shared", root_input: bool = False
) -> MedusaHeads:
    torch.manual_seed(0)
    heads = MedusaHeads(HEADS, LAYERS, HIDDEN, VOCAB, token_map, projection, RANK, root_input)
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return heads


@pytest.mark.parametrize("projection", ["shared", "own", "low_rank"])
@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("root_input", [False, True])
def test_logits_equal_the_formula_head_by_head(
    projection: ProjectionKind, reduced: bool, root_input: bool
) -> None:
    token_map = torch.tensor([3, 5, 8, 30]) if reduced else None
    heads = random_heads(token_map, projection, root_input)
    lm_head, embedding = torch.randn(VOCAB, HIDDEN), torch.randn(VOCAB, HIDDEN)
    hidden, roots = torch.randn(5, HIDDEN), torch.tensor([0, 3, 39, 3, 7])
    heads.bind(lm_head, embedding)
    logits = heads.logits(hidden, roots, HEADS)
    for k in range(HEADS):
        x = hidden
        for layer in range(LAYERS):
            y = x @ heads.weights[layer][k].t() + heads.biases[layer][k]
            if layer == 0 and heads.root_weights is not None:
                e = embedding[roots]
                y = y + e / e.square().mean(dim=1, keepdim=True).sqrt() @ heads.root_weights[k].t()
            x = x + F.silu(y)
        if heads.projection is not None:
            weight = heads.projection[k]
        elif heads.expand is not None and heads.reduce is not None:
            weight = heads.expand @ heads.reduce
        else:
            weight = lm_head if token_map is None else lm_head[token_map]
        torch.testing.assert_close(logits[k], x @ weight.t(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [4, HIDDEN])
def test_a_low_rank_projection_starts_as_the_best_of_its_rank(rank: int) -> None:
    heads = MedusaHeads(HEADS, LAYERS, HIDDEN, VOCAB, projection="low_rank", rank=rank)
    lm_head = torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(0))
    heads.start_from(lm_head)
    assert heads.expand is not None and heads.reduce is not None
    left_out = torch.linalg.svdvals(lm_head)[rank:].square().sum()
    torch.testing.assert_close(
        (heads.expand @ heads.reduce - lm_head).square().sum(), left_out, atol=1e-3, rtol=0
    )


def test_fresh_heads_guess_what_the_base_guesses() -> None:
    heads = MedusaHeads(HEADS, LAYERS, HIDDEN, VOCAB)
    lm_head, hidden = torch.randn(VOCAB, HIDDEN), torch.randn(5, HIDDEN)
    heads.bind(lm_head, lm_head)
    torch.testing.assert_close(
        heads.logits(hidden, torch.zeros(5, dtype=torch.int64), HEADS),
        (hidden @ lm_head.t()).expand(HEADS, -1, -1),
    )


@pytest.mark.parametrize("token_map", [None, torch.tensor([3, 5, 8, 30, 31, 39])])
@pytest.mark.parametrize("root_input", [False, True])
@pytest.mark.parametrize("noisy", [False, True])
def test_guesses_are_the_likeliest_tokens_of_a_head_for_every_path(
    token_map: Tensor | None, root_input: bool, noisy: bool
) -> None:
    heads = random_heads(token_map, root_input=root_input)
    heads.bind(weight := torch.randn(VOCAB, HIDDEN), weight)
    hidden, roots = torch.randn(4, HIDDEN), torch.tensor([7, 0, 39, 1])
    logits = heads.logits(hidden, roots, HEADS)
    noise = 3 * torch.randn(logits.shape[1:]) if noisy else None
    logits = logits if noise is None else logits + noise
    order, softmax = logits.argsort(dim=-1, descending=True), logits.softmax(dim=-1)
    state = heads.begin(hidden, roots, HEADS)
    tokens, origins = roots.unsqueeze(1), torch.zeros(4, 1, dtype=torch.int64)
    for head in range(HEADS):
        guesses, log_probs, state = heads.guess(head, state, tokens, origins, 5, noise)
        columns = order[head, :, :5]
        expected = columns if token_map is None else token_map[columns]
        for path in range(tokens.shape[1]):
            assert guesses[:, path].tolist() == expected.tolist()
            torch.testing.assert_close(log_probs[:, path].exp(), softmax[head].gather(1, columns))
        tokens, origins = torch.zeros(4, 3, dtype=torch.int64), torch.zeros(4, 3, dtype=torch.int64)


def test_only_the_heads_that_are_asked_for_run() -> None:
    heads = random_heads()
    heads.bind(weight := torch.randn(VOCAB, HIDDEN), weight)
    assert heads.begin(torch.randn(2, HIDDEN), torch.tensor([1, 2]), 2).shape == (2, 2, VOCAB)


def test_no_guess_is_likelier_than_certain() -> None:
    heads = random_heads()
    weight = torch.randn(VOCAB, HIDDEN, dtype=torch.bfloat16) * 100
    heads.bind(weight, weight)
    state = heads.begin(torch.randn(9, HIDDEN, dtype=torch.bfloat16), torch.arange(9), 1)
    _, log_probs, _ = heads.guess(0, state, torch.arange(9)[:, None], torch.zeros(9, 1, dtype=torch.int64), 4)
    assert log_probs.dtype == torch.float32 and (log_probs <= 0).all() and (log_probs[..., 0] > -0.1).any()


def test_binding_takes_over_the_dtype_and_refuses_another_shape() -> None:
    heads = random_heads()
    with pytest.raises(HeadsError, match="40 tokens by 16"):
        heads.bind(weight := torch.randn(VOCAB, HIDDEN * 2), weight)
    heads.bind(weight := torch.randn(VOCAB, HIDDEN, dtype=torch.bfloat16), weight)
    assert (
        heads.logits(torch.randn(1, HIDDEN, dtype=torch.bfloat16), torch.tensor([0]), 1).dtype
        == torch.bfloat16
    )


def test_heads_that_see_the_root_never_run_without_it() -> None:
    heads = MedusaHeads(HEADS, LAYERS, HIDDEN, VOCAB, projection="own", root_input=True)
    with pytest.raises(HeadsError, match="bind"):
        heads.logits(torch.randn(1, HIDDEN), torch.tensor([1]), 1)


def test_shared_heads_that_were_not_bound_say_so() -> None:
    with pytest.raises(HeadsError, match="bind"):
        random_heads().logits(torch.randn(1, HIDDEN), torch.tensor([0]), 1)
