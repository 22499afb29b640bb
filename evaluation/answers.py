"""What was measured, prompt by prompt, and the file that keeps it, so that a stopped evaluation goes on.

The first line of the file is what the figures depend on; every further line is one prompt at one temperature,
answered by all modes. A run that was killed leaves at most half a line, which is measured anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from engine.answering import Run
from engine.errors import ConfigError, GorgonError

ANSWERS = "answers.jsonl"


class EvaluateError(GorgonError):
    """An evaluation that cannot go on; the message says what to do."""


@dataclass(frozen=True)
class Difference:
    """The first place at which a mode's answer differs from that of `off`, and whether rounding may decide
    there.

    `expected` is off's token and `found` the mode's, None past its end. `gap` is how far the
    model itself is from saying either: greedy, from its largest logit to theirs; sampled, from the drawn
    number to their stretch of the distribution. None where an answer only ends early.
    """

    position: int  # of the answer's tokens
    expected: int | None
    found: int | None
    gap: float | None
    near_tie: bool


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation, answered by every mode; `differences` holds the modes whose answer differs
    from off's."""

    prompt_tokens: int
    runs: dict[str, Run]
    differences: dict[str, Difference] = field(default_factory=dict)


@dataclass(frozen=True)
class Answered:
    """One row of the prompt file at one temperature. `refused` is the reason where the engine does not run
    it."""

    index: int  # place among the sampled prompts
    id: str
    task: str
    temperature: float
    turns: list[Turn]
    refused: str | None = None


class Journal:
    """The answered prompts of one evaluation, on disk."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Read what is there. Raises ConfigError where it was measured with other settings."""
        self.path = path
        self.rows: dict[tuple[float, int], Answered] = {}
        header = msgspec.json.encode({"settings": settings}) + b"\n"
        whole = self._whole_lines()
        if not whole:
            path.write_bytes(header)
            return
        if whole[0] != header:
            raise ConfigError(
                "out",
                f"{path} was measured with other settings ({_changed(whole[0], header)}); "
                "repeat its command, or name another folder",
            )
        for number, line in enumerate(whole[1:], 2):
            try:
                row = msgspec.json.decode(line, type=Answered)
            except msgspec.DecodeError as error:
                raise EvaluateError(f"{path}:{number} is damaged ({error}); delete that line") from error
            self.rows[row.temperature, row.index] = row

    def _whole_lines(self) -> list[bytes]:
        """The complete lines. Half a line that a killed run left is cut off the file."""
        if not self.path.exists():
            return []
        content = self.path.read_bytes()
        end = content.rfind(b"\n") + 1
        if end < len(content):
            with self.path.open("r+b") as file:
                file.truncate(end)
        return content[:end].splitlines(keepends=True)

    def add(self, row: Answered) -> None:
        with self.path.open("ab") as file:
            file.write(msgspec.json.encode(row) + b"\n")
        self.rows[row.temperature, row.index] = row


def _changed(before: bytes, now: bytes) -> str:
    """Names of the settings that differ."""
    try:
        old, new = (msgspec.json.decode(line)["settings"] for line in (before, now))
    except (msgspec.DecodeError, KeyError, TypeError):
        return "its first line holds none"
    return ", ".join(sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name)))
