"""Hydra heads: the batched pass over texts equals the formulas, written out for one anchor at a time."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from heads.hydra import HydraHeads
from heads.prefix import ROPE_THETA, PrefixLayer, rotate

HIDDEN, VOCAB, HEADS, KV_HEADS, HEAD_DIM = 12, 30, 4, 2, 6


def random_heads(num_heads: int = 3) -> HydraHeads:
    torch.manual_seed(0)
    heads = HydraHeads(num_heads, VOCAB, PrefixLayer(HIDDEN, HEADS, KV_HEADS, HEAD_DIM, 10))
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return heads


def unit(x: Tensor) -> Tensor:
    return x / x.square().mean(dim=-1, keepdim=True).sqrt()


def turned(x: Tensor, position: int) -> Tensor:
    """One head's vector [head_dim], each pair of halves turned by its angle."""
    half = len(x) // 2
    out = x.clone()
    for i in range(half):
        angle = position * ROPE_THETA ** (-i / half)
        out[i] = x[i] * math.cos(angle) - x[half + i] * math.sin(angle)
        out[half + i] = x[half + i] * math.cos(angle) + x[i] * math.sin(angle)
    return out


def start_of(prefix: PrefixLayer, hidden: Tensor, embeddings: Tensor, t: int) -> Tensor:
    """What the heads start from at anchor t, from the docstring's formulas."""
    before = [torch.zeros(HIDDEN), *map(unit, hidden[: t + 1])]
    entries = [torch.cat((row, unit(embeddings[p]))) for p, row in enumerate(before)]
    kv = [(prefix.kv.weight @ x).view(2, KV_HEADS, HEAD_DIM) for x in entries]
    q = (prefix.q.weight @ entries[t + 1]).view(HEADS, HEAD_DIM)
    reads = []
    for head in range(HEADS):
        mine = head // (HEADS // KV_HEADS)
        scores = torch.stack(
            [turned(q[head], t + 1) @ turned(kv[p][0, mine], p) / HEAD_DIM**0.5 for p in range(t + 2)]
        )
        reads.append(sum(share * kv[p][1, mine] for p, share in enumerate(scores.softmax(0))))
    g = hidden[t] + prefix.o.weight @ torch.cat(reads)  # type: ignore[arg-type]
    gate, up = (prefix.gate_up.weight @ unit(g)).chunk(2)
    return g + prefix.down.weight @ (F.silu(gate) * up)


def test_features_equal_the_formulas_at_every_anchor() -> None:
    heads = random_heads()
    hidden, embeddings = torch.randn(2, 7, HIDDEN), torch.randn(2, 7, HIDDEN)
    anchors = torch.tensor([0, 3, 7, 10])
    with torch.no_grad():
        features = heads.sequence_features(hidden, embeddings, anchors)
        for place, anchor in enumerate(anchors.tolist()):
            row, t = divmod(anchor, 7)
            s = start_of(heads.prefix, hidden[row], embeddings[row], t)
            for head in range(3):
                x = torch.cat((unit(s), unit(embeddings[row, t + 1 + head])))
                s = s + F.silu(heads.weights[head] @ x + heads.biases[head])
                torch.testing.assert_close(features[head][place], s, rtol=1e-3, atol=1e-4)


def test_paths_that_are_followed_get_the_features_of_the_text_they_spell() -> None:
    heads = random_heads()
    embedding = torch.randn(VOCAB, HIDDEN)
    heads.requires_grad_(False).bind(torch.randn(VOCAB, HIDDEN), embedding)
    hidden, texts = torch.randn(2, 4, HIDDEN), torch.randint(VOCAB, (2, 7))
    longer = F.pad(hidden, (0, 0, 0, 3))
    anchors = torch.tensor([3, 10])  # roots are token 4 of each text
    expected = heads.sequence_features(longer, embedding[texts], anchors)
    starts = heads.prefix(longer, embedding[texts])[:, 3]
    state = heads.begin(starts, texts[:, 4], 3)
    tokens, origins = texts[:, 4:5], torch.zeros(2, 1, dtype=torch.int64)
    for head in range(3):
        logits, state = heads.follow(head, state, tokens, origins)
        # The true path is the last of those followed, the others are made up.
        torch.testing.assert_close(state[:, -1], expected[head])
        torch.testing.assert_close(logits[:, -1], heads.head_logits(head, expected[head]))
        true = texts[:, 5 + head : 6 + head]
        last = torch.full_like(true, tokens.shape[1] - 1)
        tokens = torch.cat((torch.randint(VOCAB, (2, head + 2)), true), dim=1)
        origins = torch.cat((torch.zeros(2, head + 2, dtype=torch.int64), last), dim=1)


def test_a_head_sees_its_path_and_nothing_after_it() -> None:
    heads = random_heads()
    hidden, embeddings = torch.randn(1, 9, HIDDEN), torch.randn(1, 9, HIDDEN)
    anchor = torch.tensor([3])
    before = heads.sequence_features(hidden, embeddings, anchor)
    for changed in range(9):
        other = embeddings.clone()
        other[0, changed] += 1
        after = heads.sequence_features(hidden, other, anchor)
        same = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
        # Head k has seen the text, the root at 4 and k guessed tokens.
        assert same == [changed > 4 + head for head in range(3)]


def test_rotation_keeps_lengths_and_depends_on_the_distance_alone() -> None:
    q, k = torch.randn(1, 1, HEAD_DIM), torch.randn(1, 1, HEAD_DIM)

    def product(i: int, j: int) -> Tensor:
        return (rotate(q, torch.tensor([i])) * rotate(k, torch.tensor([j]))).sum()

    torch.testing.assert_close(rotate(q, torch.tensor([900])).norm(), q.norm())
    torch.testing.assert_close(product(5, 2), product(105, 102), rtol=1e-3, atol=1e-4)


def test_fresh_heads_guess_what_the_base_guesses() -> None:
    heads = HydraHeads(2, VOCAB, PrefixLayer(HIDDEN, HEADS, KV_HEADS, HEAD_DIM, 10))
    hidden, embeddings = torch.randn(1, 6, HIDDEN), torch.randn(1, 6, HIDDEN)
    for features in heads.sequence_features(hidden, embeddings, torch.tensor([2, 4])):
        torch.testing.assert_close(features, hidden[0, [2, 4]])
