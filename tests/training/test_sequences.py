"""Batches of conversations: anchors and targets line up with serving, and the order is the seed's."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import pytest
import torch

from tests.training.tiny import PROMPT, tiny_decoder, tiny_documents
from training.dataset import Document
from training.hidden_states import HiddenCache, extract
from training.sequences import Sequences


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> HiddenCache:
    return extract(tiny_decoder(), tiny_documents(20), tmp_path_factory.mktemp("cache"))


def test_head_k_is_to_guess_the_token_k_places_after_the_one_after_the_root(cache: HiddenCache) -> None:
    documents = tiny_documents(20)
    batch = Sequences(cache).load([3, 8, 0])
    length = batch.token_ids.shape[1]
    targets = [batch.targets(head).tolist() for head in range(3)]
    seen = []
    for place, anchor in enumerate(batch.anchors.tolist()):
        row, t = divmod(anchor, length)
        tokens = documents[[3, 8, 0][row]].token_ids
        assert [target[place] for target in targets] == ([*tokens, -1, -1, -1])[t + 2 : t + 5]
        seen.append((row, t))
    expected = [
        (row, t)
        for row, number in enumerate([3, 8, 0])
        for t in range(PROMPT - 1, len(documents[number].token_ids) - 2)
    ]
    assert seen == expected


def test_targets_never_come_from_another_turn(tmp_path: Path) -> None:
    document = Document(list(range(12)), [(3, 6), (8, 12)], greedy=True, held_out=False)
    batch = Sequences(extract(tiny_decoder(), [document], tmp_path)).load([0])
    assert batch.anchors.tolist() == [2, 3, 7, 8, 9]
    assert batch.targets(0).tolist() == [4, 5, 9, 10, 11]
    assert batch.targets(1).tolist() == [5, -1, 10, 11, -1]


def test_rows_are_the_cached_ones_and_padding_is_zero(cache: HiddenCache) -> None:
    batch = Sequences(cache).load([1, 2])
    for row, number in enumerate([1, 2]):
        start, end = cache.documents[number].tolist()
        assert torch.equal(batch.hidden[row, : end - start], cache.hidden[start:end])
        assert not batch.hidden[row, end - start :].any()


def test_every_epoch_sees_every_document_once_in_an_order_of_its_own(cache: HiddenCache) -> None:
    sequences = Sequences(cache)
    chosen = torch.arange(5, 20)
    once, twice = (sequences.plan(chosen, 64, epochs, seed=1) for epochs in (1, 2))
    assert twice[: len(once)] == once
    assert sorted(chain(*once)) == chosen.tolist()
    assert sorted(chain(*twice[len(once) :])) == chosen.tolist()
    assert twice[len(once) :] != once
    assert sequences.plan(chosen, 64, 1, seed=2) != once
    assert len(sequences.plan(chosen, 64, 0.5, seed=1)) == round(len(once) / 2)


def test_batches_keep_to_their_size_unless_one_conversation_is_longer(cache: HiddenCache) -> None:
    sequences = Sequences(cache)
    for batch in sequences.batches(range(20), 64):
        assert len(batch) == 1 or len(batch) * max(sequences.lengths[i] for i in batch) <= 64
    assert all(len(batch) == 1 for batch in sequences.batches(range(20), 1))
