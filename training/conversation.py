"""One conversation that the model is to answer: which prompts it brings, how far it is, what came of it.

A conversation is answered turn by turn, the model's own answers becoming its context. Answers that the
prompts bring, in the middle or at the end, are dropped and written anew: training takes every assistant turn
of a row for the model's. A conversation ends with an answer that was cut, because a turn after it would
claim that the model had stopped there.
"""

from __future__ import annotations

import hashlib
import zlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import RequestError
from engine.messages import AddRequest, ModelInfo, RequestOutput, SamplingParams
from engine.model.tokenizer import ChatTokenizer
from training.dataset import DataError, read_rows

_ASKED_ROLES = ("system", "developer", "user")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How rows are answered. `greedy_share` of them are greedy, the others drawn at `temperature`."""

    max_tokens: int
    temperature: float
    greedy_share: float
    seed: int


@dataclass(frozen=True)
class Prompt:
    """One conversation to answer; `messages` without any answers."""

    id: str
    category: object  # as the row has it, None where it has none
    messages: list[dict[str, Any]]


class FailedError(Exception):
    """A row that cannot be answered. `reason` is what failures are counted by."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason = reason
        super().__init__(detail)


def read_prompts(path: Path) -> list[Prompt]:
    """The conversations of a .jsonl or .jsonl.gz file; a row without an id gets its number, from 0.

    Raises DataError for a file that cannot be read, without rows, or with an id that two rows share.
    """
    prompts: dict[str, Prompt] = {}
    try:
        for number, row in enumerate(read_rows(path)):
            row_id = str(row.get("id", number))
            if row_id in prompts:
                raise DataError(f"{path.name} line {number + 1} has the id {row_id!r} of an earlier row")
            asked = [message for message in row["messages"] if message["role"] != "assistant"]
            prompts[row_id] = Prompt(row_id, row.get("category"), asked)
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if not prompts:
        raise DataError(f"{path} holds no rows")
    return list(prompts.values())


def choose(prompts: Sequence[Prompt], number: int, seed: int) -> list[Prompt]:
    """`number` prompts drawn by the seed, in their order. A larger number draws the same and more."""
    drawn = sorted(range(len(prompts)), key=lambda i: _hash(seed, "choose", prompts[i].id))[:number]
    return [prompts[i] for i in sorted(drawn)]


def _hash(seed: int, purpose: str, row_id: str) -> int:
    """64 bits that depend on nothing else, so that a row is the same whenever it is answered."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{purpose}\0{row_id}".encode()).digest()[:8], "big")


class Conversation:
    """One row on its way: which turn is being answered, and with what tokens so far."""

    def __init__(self, prompt: Prompt, sampling: Sampling) -> None:
        self.prompt = prompt
        greedy = _hash(sampling.seed, "greedy", prompt.id) < sampling.greedy_share * 2**64
        self.params = SamplingParams(
            max_tokens=sampling.max_tokens,
            temperature=0.0 if greedy else sampling.temperature,
            seed=_hash(sampling.seed, "draw", prompt.id),
        )
        self.messages: list[dict[str, Any]] = []
        self.num_tokens = 0
        self._asked = deque(prompt.messages)
        self._answer: list[int] = []

    def next_turn(self, tokenizer: ChatTokenizer, info: ModelInfo) -> AddRequest | None:
        """Take up the next user turn; None where all are answered. Raises FailedError."""
        while self._asked:
            message = self._asked.popleft()
            if message["role"] not in _ASKED_ROLES:
                raise FailedError("unsupported role", f"messages of role {message['role']!r} are not asked")
            self.messages.append(message)
            if message["role"] == "user":
                return AddRequest(self.prompt.id, self._encode(tokenizer, info), self.params)
        if not self.num_tokens:
            raise FailedError("no user turn", "no message has the role user")
        return None

    def _encode(self, tokenizer: ChatTokenizer, info: ModelInfo) -> list[int]:
        try:
            token_ids = tokenizer.encode_chat(self.messages)
        except RequestError as error:
            raise FailedError("template error", str(error)) from error
        if len(token_ids) >= info.max_model_len:
            detail = f"{len(token_ids)} tokens; the context has {info.max_model_len} with the answer"
            raise FailedError("prompt too long", detail)
        return token_ids

    def take(self, output: RequestOutput, tokenizer: ChatTokenizer) -> None:
        """Take in what a step brought; the answer joins the messages when it ends. Raises FailedError."""
        self._answer += output.token_ids
        if output.finish_reason is None:
            return
        if output.finish_reason == "abort":
            raise FailedError("engine error", "the pass failed; the log above has the cause")
        ended = output.stop_token_id is not None
        text = tokenizer.decode(self._answer[:-1] if ended else self._answer, skip_special_tokens=True)
        if not ended:
            text = text.rstrip("\N{REPLACEMENT CHARACTER}")  # a character that was cut in the middle
            self._asked.clear()
        if not text.strip():
            raise FailedError("empty answer", f"{len(self._answer)} tokens without text")
        self.messages.append({"role": "assistant", "content": text})
        self.num_tokens += len(self._answer)
        self._answer = []

    def named(self) -> dict[str, Any]:
        category = {} if self.prompt.category is None else {"category": self.prompt.category}
        return {"id": self.prompt.id, **category}

    def row(self, finish_reason: str) -> dict[str, Any]:
        return {
            **self.named(),
            "temperature": self.params.temperature,
            "messages": self.messages,
            "finish_reason": finish_reason,
            "tokens": self.num_tokens,
        }
