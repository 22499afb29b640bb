"""Proves that no evaluation prompt is in training text: no whole turn, and no 13 words of one in a row.

GPT-3 (arXiv 2005.14165, appendix C) took 13 words for an overlap. Of a training row every message counts,
answers too; of an evaluation row each user turn by itself. Words are compared without case and punctuation.
Time is linear in the text: every run of words is looked up once.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.dataset import DataError, read_rows

NUM_WORDS = 13

# Chinese and Japanese put no spaces between words: each character counts as one.
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")


@dataclass(frozen=True)
class Row:
    """One row of one file, for people to find it."""

    file: str
    id: str


@dataclass(frozen=True)
class Overlap:
    """A training row that shares text with evaluation rows."""

    row: Row
    exact: tuple[Row, ...]  # evaluation rows of which it holds a whole turn
    partial: tuple[Row, ...]  # others, of which it holds NUM_WORDS words in a row
    roles: tuple[str, ...]  # of the messages that hold it: an answer may share words by chance
    words: str  # the first that are shared


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, with compatible characters unified and punctuation dropped."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


def _normal(text: str) -> str:
    """The form in which exact matches are compared. Text without words keeps its signs."""
    return " ".join(words_of(text) or text.split())


def _runs(words: Sequence[str]) -> Iterator[str]:
    for begin in range(len(words) - NUM_WORDS + 1):
        yield " ".join(words[begin : begin + NUM_WORDS])


class EvaluationPrompts:
    """The user turns of evaluation files, indexed."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self._turns: dict[str, list[int]] = defaultdict(list)
        self._runs: dict[str, list[int]] = defaultdict(list)

    def add(self, row: Row, messages: Iterable[dict[str, Any]]) -> None:
        index = len(self.rows)
        self.rows.append(row)
        for message in messages:
            if message["role"] == "user" and (text := message["content"]).strip():
                self._turns[_normal(text)].append(index)
                for run in set(_runs(words_of(text))):
                    self._runs[run].append(index)

    def find(self, row: Row, messages: Iterable[dict[str, Any]]) -> Overlap | None:
        """What a training row shares with any of these turns. None where it shares nothing."""
        exact: dict[int, None] = {}
        partial: dict[int, None] = {}
        roles: dict[str, None] = {}
        first = ""
        for message in messages:
            normal = _normal(message["content"])
            found = [(exact, normal, self._turns)] if normal in self._turns else []
            found += [
                (partial, r, self._runs) for r in _runs(words_of(message["content"])) if r in self._runs
            ]
            for rows, words, index in found:
                rows |= dict.fromkeys(index[words])
                roles[message["role"]] = None
                first = first or words
        if not exact and not partial:
            return None
        return Overlap(
            row,
            tuple(self.rows[i] for i in exact),
            tuple(self.rows[i] for i in partial if i not in exact),
            tuple(roles),
            first,
        )


@dataclass(frozen=True)
class OverlapReport:
    num_rows: dict[str, int]  # by training file
    num_evaluation: dict[str, int]  # by evaluation file
    overlaps: list[Overlap]


def _rows(path: Path) -> Iterator[tuple[Row, list[dict[str, Any]]]]:
    """Raises DataError for a file that cannot be read."""
    for number, row in enumerate(read_rows(path)):
        yield Row(str(path), str(row.get("id", number))), row["messages"]


def find_overlaps(data: Sequence[Path], evaluation: Sequence[Path]) -> OverlapReport:
    """All training rows that hold text of an evaluation prompt.

    Raises DataError for a file that cannot be read or holds nothing: nothing would be proved.
    """
    prompts = EvaluationPrompts()
    num_evaluation: dict[str, int] = {}
    for path in evaluation:
        before = len(prompts.rows)
        for row, messages in _rows(path):
            prompts.add(row, messages)
        num_evaluation[str(path)] = _some(path, len(prompts.rows) - before)
    num_rows: dict[str, int] = {}
    overlaps: list[Overlap] = []
    for path in data:
        number = 0
        for row, messages in _rows(path):
            number += 1
            if (found := prompts.find(row, messages)) is not None:
                overlaps.append(found)
        num_rows[str(path)] = _some(path, number)
    return OverlapReport(num_rows, num_evaluation, overlaps)


def _some(path: Path, number: int) -> int:
    if not number:
        raise DataError(f"{path} holds no rows")
    return number
