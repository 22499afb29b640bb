"""The cache of hidden rows: batching changes nothing, a killed run goes on, targets line up with serving."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.engine.backends.native.decoders import random_decoder, wide_config
from tests.training.tiny import PROMPT, tiny_decoder, tiny_documents
from training import hidden_states
from training.dataset import Document
from training.document_rows import DenseCausalAttention, make_reader
from training.hidden_states import extract, open_cache


@pytest.fixture(autouse=True)
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hidden_states, "GROUP_SIZE", 4)
    monkeypatch.setattr(hidden_states, "TOKENS_PER_PASS", 64)


def test_rows_are_those_of_a_lone_pass_whatever_the_batch(tmp_path: Path) -> None:
    decoder, documents = tiny_decoder(), tiny_documents(11)
    cache = extract(decoder, documents, tmp_path)
    for document, (start, end) in zip(documents, cache.documents.tolist(), strict=True):
        tokens = torch.tensor(document.token_ids)
        with torch.inference_mode():
            hidden = decoder(tokens, torch.arange(len(tokens)), DenseCausalAttention(1, len(tokens)))
        torch.testing.assert_close(cache.hidden[start:end], hidden.bfloat16(), rtol=0.02, atol=0.01)
        assert cache.token_ids[start:end].tolist() == document.token_ids
    assert cache.greedy.tolist() == [d.greedy for d in documents]
    assert cache.held_out.tolist() == [d.held_out for d in documents]


def test_rows_by_the_cpu_kernels_are_those_by_torch() -> None:
    decoder = random_decoder(wide_config(num_layers=3, max_positions=256))
    documents = [Document([i * 7 % 100 for i in range(n)], [(1, n)], True, False) for n in (5, 33, 70, 64)]
    rows = make_reader(decoder, 200, 4)(documents)
    for document, found in zip(documents, rows, strict=True):
        tokens = torch.tensor(document.token_ids)
        with torch.inference_mode():
            wanted = decoder(tokens, torch.arange(len(tokens)), DenseCausalAttention(1, len(tokens)))
        assert found.shape == wanted.shape
        error = (found.float() - wanted.float()).square().mean().sqrt()
        assert error < 0.02 * wanted.float().square().mean().sqrt()


def test_answers_are_the_spans_of_their_documents(tmp_path: Path) -> None:
    documents = tiny_documents(3)
    cache = extract(tiny_decoder(), documents, tmp_path)
    assert cache.owners.tolist() == [0, 1, 2]
    for document, (first, _), (start, end) in zip(
        documents, cache.documents.tolist(), cache.answers.tolist(), strict=True
    ):
        assert [(start - first, end - first)] == document.spans
        assert cache.is_answer[first:end].tolist() == [False] * PROMPT + [True] * (end - start)
    assert cache.num_answer_tokens == sum(d.num_answer_tokens for d in documents)


def test_a_killed_run_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, documents = tiny_decoder(), tiny_documents(11)
    whole = extract(decoder, documents, tmp_path / "whole")
    read, passes = make_reader(decoder, 64, 4), 0

    def count(documents: list[Document]) -> list[torch.Tensor]:
        nonlocal passes
        passes += 1
        if passes == 3:
            raise KeyboardInterrupt
        return read(documents)

    monkeypatch.setattr(hidden_states, "make_reader", lambda *args: count)
    with pytest.raises(KeyboardInterrupt):
        extract(decoder, documents, tmp_path / "killed")
    extract(decoder, documents, tmp_path / "killed")
    done = passes
    [folder] = (tmp_path / "killed").iterdir()
    resumed = open_cache(folder)
    assert torch.equal(resumed.hidden, whole.hidden)
    extract(decoder, documents, tmp_path / "killed")
    assert passes == done, "a finished cache is not computed again"


def test_other_weights_and_other_text_have_caches_of_their_own(tmp_path: Path) -> None:
    decoder, documents = tiny_decoder(), tiny_documents(5)
    first = extract(decoder, documents, tmp_path)
    before = first.hidden.clone()
    torch.nn.init.constant_(decoder.norm.weight, 2.0)
    other = extract(decoder, documents, tmp_path)
    torch.testing.assert_close(other.hidden.float(), before.float() * 2, rtol=0.02, atol=0.02)
    fewer = extract(decoder, documents[:3], tmp_path)
    assert len({first.origin, other.origin, fewer.origin}) == len(list(tmp_path.iterdir())) == 3
    assert torch.equal(open_cache(tmp_path / first.origin).hidden, before)
