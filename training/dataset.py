"""Conversations as token sequences that say which tokens the assistant wrote: heads learn from those alone.

Reads JSON lines of `{"messages": [...]}`, gzipped or not. A row may carry `temperature` (absent or 0: the
text is greedy), `finish_reason` ("length": the last answer was cut, so that it has no end) and `task`,
`category` or `source`, by which figures are told apart.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.errors import GorgonError
from engine.model.tokenizer import ChatTokenizer


class DataError(GorgonError):
    """Training text that cannot be read; the message names the file and the line."""


@dataclass(frozen=True)
class Document:
    """One conversation. `spans` are the [start, end) ranges of the tokens that the assistant wrote."""

    token_ids: list[int]
    spans: list[tuple[int, int]]
    greedy: bool
    held_out: bool  # never trained on
    task: str = field(default="", repr=False)  # no part of the digest: nothing is computed from it

    @property
    def num_answer_tokens(self) -> int:
        return sum(end - start for start, end in self.spans)


HELD_OUT_PERCENT = 4
_TASK_NAMES = ("task", "category", "source")  # what a row may call the kind of its question, best first


def is_held_out(messages: list[dict[str, Any]]) -> bool:
    """Whether this conversation belongs to the held-out share: decided by its first message's text, so that
    two answers to one question never fall on different sides."""
    digest = hashlib.sha256(str(messages[0].get("content")).encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100 < HELD_OUT_PERCENT


def digest(documents: list[Document]) -> str:
    """SHA-256 of all there is to the documents, for the manifest of what was computed from them."""
    total = hashlib.sha256()
    for document in documents:
        total.update(repr(document).encode())
    return total.hexdigest()


def _is_message(message: object) -> bool:
    return (
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
    )


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a .jsonl or .jsonl.gz file. Raises DataError at the first line that is no conversation."""
    with (
        gzip.open(path, "rt", encoding="utf-8")
        if path.suffix == ".gz"
        else path.open(encoding="utf-8") as file
    ):
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path.name} line {number} is not JSON: {error}") from error
            messages = row.get("messages") if isinstance(row, dict) else None
            if not isinstance(messages, list) or not all(_is_message(m) for m in messages):
                raise DataError(f"{path.name} line {number} has no list of messages with role and content")
            yield row


def encode_row(row: dict[str, Any], tokenizer: ChatTokenizer, end_of_turn: str) -> Document:
    """Token ids of one row, cut after its last answer. Raises DataError where the chat template does not
    repeat earlier turns word for word, because then the spans would be wrong."""
    messages = row["messages"]
    token_ids: list[int] = []
    spans: list[tuple[int, int]] = []
    done = ""  # text that token_ids stands for
    last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=-1)
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = tokenizer.render_chat(messages[:i], add_generation_prompt=True)
        if not prompt.startswith(done):
            raise DataError("the chat template rewrites earlier turns; only single-turn rows can be used")
        token_ids += tokenizer.encode(prompt[len(done) :], add_special_tokens=False)
        cut = i == last and row.get("finish_reason") == "length"
        answer = message["content"] + ("" if cut else end_of_turn)
        start = len(token_ids)
        token_ids += tokenizer.encode(answer, add_special_tokens=False)
        spans.append((start, len(token_ids)))
        done = prompt + answer
    return Document(
        token_ids,
        spans,
        greedy=not row.get("temperature"),
        held_out=is_held_out(messages),
        task=next((str(row[name]) for name in _TASK_NAMES if row.get(name)), ""),
    )


def load_documents(
    path: Path, tokenizer: ChatTokenizer, end_of_turn: str, max_positions: int, max_length: int, seed: int
) -> list[Document]:
    """Up to `max_positions` answer tokens of the file, greedy rows first (what is served most is greedy),
    in an order fixed by the seed, no document longer than `max_length` tokens.
    """
    rows = list(read_rows(path))
    random.Random(seed).shuffle(rows)
    rows.sort(key=lambda row: bool(row.get("temperature")))
    documents: list[Document] = []
    positions = 0
    for row in rows:
        if positions >= max_positions:
            break
        document = encode_row(row, tokenizer, end_of_turn)
        if document.spans and len(document.token_ids) <= max_length:
            documents.append(document)
            positions += document.num_answer_tokens
    if not documents:
        raise DataError(f"{path.name} holds no answer of an assistant")
    return documents
