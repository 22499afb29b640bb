"""Hidden rows of the frozen backbone over whole conversations, computed once and kept on disk.

A cache directory has a folder for every model and text, named by a digest of both. It holds `hidden.npy`
(bfloat16 rows stored as uint16), `token_ids.npy`, `documents.npy`, `answers.npy` and `manifest.json`, is
filled in groups of documents and notes each finished group, so that a killed run goes on where it stopped.

Heads are trained on *anchors*: row t together with token t + 1, as at serving the row of the last computed
token and the root committed after it. Head k, counted from 0, then guesses token t + 2 + k.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.model.decoder import Decoder
from training.dataset import Document, digest
from training.document_rows import make_reader

MANIFEST_VERSION = 2
GROUP_SIZE = 32  # documents between two notes of progress
# Tokens of a pass, padding included: more would not fit a CPU's cache, less would leave a GPU idle.
TOKENS_PER_PASS = 1024
CUDA_TOKENS_PER_PASS = 16_384


@dataclass(frozen=True)
class HiddenCache:
    """The rows of all documents, one after the other. `origin` is a digest of what they come from."""

    origin: str
    hidden: Tensor  # [num_rows, hidden] bfloat16, mapped from disk; row i belongs to token i
    token_ids: Tensor  # [num_rows] int64
    documents: Tensor  # [num_documents, 2] int64: [start, end) row ranges of whole conversations
    answers: Tensor  # [num_answers, 2] int64: [start, end) row ranges of the tokens the assistant wrote
    owners: Tensor  # [num_answers] int64: each answer's document
    held_out: Tensor  # [num_documents] bool
    greedy: Tensor  # [num_documents] bool
    seconds: float | None = None  # time of the backbone's passes; None if unknown

    @cached_property
    def num_answer_tokens(self) -> int:
        return int((self.answers[:, 1] - self.answers[:, 0]).sum())

    @cached_property
    def is_answer(self) -> Tensor:
        """[num_rows] bool: whether the assistant wrote this row's token."""
        edges = torch.zeros(len(self.token_ids) + 1, dtype=torch.int64)
        edges[self.answers[:, 0]] += 1
        edges[self.answers[:, 1]] -= 1
        return edges.cumsum(0)[:-1] > 0


def _batches(documents: list[Document], num_tokens: int) -> Iterator[list[int]]:
    """Document numbers in batches of similar length, at most `num_tokens` tokens with padding."""
    batch: list[int] = []
    for i in sorted(range(len(documents)), key=lambda i: len(documents[i].token_ids)):
        if batch and (len(batch) + 1) * len(documents[i].token_ids) > num_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _tables(documents: list[Document]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Documents [num_documents, 4]: first row, end row, held out, greedy; answers [num_answers, 3]: first
    row, end row, document."""
    rows, answers, row = [], [], 0
    for number, document in enumerate(documents):
        answers += [(row + start, row + end, number) for start, end in document.spans]
        rows.append((row, row + len(document.token_ids), document.held_out, document.greedy))
        row += len(document.token_ids)
    return np.array(rows, dtype=np.int64), np.array(answers, dtype=np.int64)


def _write_manifest(directory: Path, manifest: dict[str, Any]) -> None:
    partial = directory / "manifest.json.partial"
    partial.write_text(json.dumps(manifest, indent=1) + "\n")
    partial.replace(directory / "manifest.json")


def fingerprint(decoder: Decoder) -> str:
    """SHA-256 of the model's configuration and weights, because a name may later stand for other weights."""
    total = hashlib.sha256(repr(decoder.config).encode())
    for parameter in decoder.parameters():
        total.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return total.hexdigest()


def extract(decoder: Decoder, documents: list[Document], cache_dir: Path) -> HiddenCache:
    """Fill the cache of this model and these documents, continue after a kill, and open it.

    Caches of other models and documents in `cache_dir` are left alone.
    """
    key = {"version": MANIFEST_VERSION, "model": fingerprint(decoder), "documents": digest(documents)}
    directory = cache_dir / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    directory.mkdir(parents=True, exist_ok=True)
    table, answers = _tables(documents)
    num_rows, hidden_size = int(table[-1, 1]), decoder.config.hidden_size
    header = {**key, "num_rows": num_rows, "hidden_size": hidden_size}
    path = directory / "manifest.json"
    manifest: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if {name: manifest.get(name) for name in header} != header:
        manifest = {**header, "groups_done": 0, "seconds": 0.0}
        np.lib.format.open_memmap(directory / "hidden.npy", "w+", np.uint16, (num_rows, hidden_size))
        tokens = [token for document in documents for token in document.token_ids]
        np.save(directory / "token_ids.npy", np.array(tokens, dtype=np.int64))
        np.save(directory / "documents.npy", table)
        np.save(directory / "answers.npy", answers)
        _write_manifest(directory, manifest)
    _fill(decoder, documents, directory, manifest)
    return open_cache(directory)


def _fill(decoder: Decoder, documents: list[Document], directory: Path, manifest: dict[str, Any]) -> None:
    hidden = np.load(directory / "hidden.npy", mmap_mode="r+")
    first_rows = np.cumsum([0, *(len(d.token_ids) for d in documents)])
    first = manifest["groups_done"] * GROUP_SIZE
    tokens_left = sum(len(d.token_ids) for d in documents[first:])
    num_tokens = CUDA_TOKENS_PER_PASS if decoder.embedding.is_cuda else TOKENS_PER_PASS
    if first >= len(documents):
        return
    longest = max(len(d.token_ids) for d in documents[first:])
    read = make_reader(decoder, max(num_tokens, longest), GROUP_SIZE)
    tokens_done, seconds = 0, 0.0
    for begin in range(first, len(documents), GROUP_SIZE):
        group = documents[begin : begin + GROUP_SIZE]
        began = time.monotonic()
        for batch in _batches(group, num_tokens):
            for i, rows in zip(batch, read([group[i] for i in batch]), strict=True):
                hidden[first_rows[begin + i] : first_rows[begin + i + 1]] = rows.view(torch.uint16).numpy()
        spent = time.monotonic() - began
        seconds += spent
        hidden.flush()
        manifest["groups_done"] += 1
        if "seconds" in manifest:
            manifest["seconds"] += spent
        _write_manifest(directory, manifest)
        tokens_done += sum(len(d.token_ids) for d in group)
        rate = tokens_done / seconds
        print(
            f"hidden states: {begin + len(group)}/{len(documents)} documents, {rate:.0f} tokens/s, "
            f"{(tokens_left - tokens_done) / rate / 60:.1f} min left",
            flush=True,
        )


def open_cache(directory: Path) -> HiddenCache:
    """Open a finished cache."""
    hidden = torch.from_numpy(np.load(directory / "hidden.npy", mmap_mode="r+")).view(torch.bfloat16)
    documents = torch.from_numpy(np.load(directory / "documents.npy"))
    answers = torch.from_numpy(np.load(directory / "answers.npy"))
    manifest = json.loads((directory / "manifest.json").read_text())
    return HiddenCache(
        origin=directory.name,
        hidden=hidden,
        token_ids=torch.from_numpy(np.load(directory / "token_ids.npy")),
        documents=documents[:, :2],
        answers=answers[:, :2],
        owners=answers[:, 2],
        held_out=documents[:, 2].bool(),
        greedy=documents[:, 3].bool(),
        seconds=manifest.get("seconds"),
    )
