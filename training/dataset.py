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
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.errors import GorgonError, RequestError
from engine.text.tokenizer import ChatTokenizer


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
    """The rows of a .jsonl or .jsonl.gz file, one a line. Raises DataError for a file that cannot be read and
    at the first line that is no conversation."""
    try:
        with (
            gzip.open(path, "rt", encoding="utf-8")
            if path.suffix == ".gz"
            else path.open(encoding="utf-8") as file
        ):
            for number, line in enumerate(file, start=1):
                yield _row(line, path, number)
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _row(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        row: dict[str, Any] = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{path.name} line {number} is not JSON: {error}") from error
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list) or not messages or not all(_is_message(m) for m in messages):
        raise DataError(f"{path.name} line {number} has no list of messages with role and content")
    return row


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
        token_ids += tokenizer.encode_chat(messages[:i], skip=len(done))
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
    in an order fixed by the seed, no document longer than `max_length` tokens; says how many were. Raises
    DataError where nothing is left, and for a row that the chat template does not take, by its line.
    """
    rows = list(enumerate(read_rows(path), start=1))
    random.Random(seed).shuffle(rows)
    rows.sort(key=lambda numbered: bool(numbered[1].get("temperature")))
    documents: list[Document] = []
    positions = num_too_long = 0
    for number, row in rows:
        if positions >= max_positions:
            break
        try:
            document = encode_row(row, tokenizer, end_of_turn)
        except (DataError, RequestError) as error:
            raise DataError(f"{path.name} line {number}: {error}") from error
        if not document.spans:
            continue
        if len(document.token_ids) > max_length:
            num_too_long += 1
            continue
        documents.append(document)
        positions += document.num_answer_tokens
    if not documents and num_too_long:
        raise DataError(
            f"all {num_too_long} conversations of {path.name} are longer than {max_length} tokens; give "
            "shorter ones"
        )
    if not documents:
        raise DataError(f"{path.name} holds no answer of an assistant")
    if num_too_long:
        print(f"left out: {num_too_long} conversations longer than {max_length} tokens", flush=True)
    return documents
