"""One conversation that the model answers: its prompts, its progress, its result.

The model answers turn by turn, and its own answers become the context. Answers in the prompt file are
dropped, because training takes every assistant turn of a row for the model's own words. A conversation ends
early, and its row says how many turns were not asked, in three cases: an answer was cut, and a turn after it
would claim that the model had stopped there; the chat template rewrites earlier turns, so that training could
not find the answers; the context is full.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import RequestError
from engine.messages import AddRequest, ModelInfo, RequestOutput, SamplingParams
from engine.text.tokenizer import ChatTokenizer
from training.dataset import DataError, read_rows

_ASKED_ROLES = ("system", "developer", "user")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How rows are answered: `greedy_share` of them greedily, the others drawn at `temperature`."""

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
    """A row that cannot be answered. Failures are counted by `reason`."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason = reason
        super().__init__(detail)


def read_prompts(path: Path) -> list[Prompt]:
    """The conversations of a .jsonl or .jsonl.gz file. A row without an id gets its number, counted from 0.

    Raises DataError for a file that cannot be read or has no rows, and for an id that two rows share.
    """
    prompts: dict[str, Prompt] = {}
    for number, row in enumerate(read_rows(path)):
        row_id = str(number if row.get("id") is None else row["id"])
        if row_id in prompts:
            raise DataError(f"{path.name} line {number + 1} has the id {row_id!r} of an earlier row")
        asked = [message for message in row["messages"] if message["role"] != "assistant"]
        prompts[row_id] = Prompt(row_id, row.get("category"), asked)
    if not prompts:
        raise DataError(f"{path} holds no rows")
    return list(prompts.values())


def choose(prompts: Sequence[Prompt], number: int, seed: int) -> list[Prompt]:
    """`number` prompts drawn by the seed, in their order. A larger number draws the same ones and more."""
    drawn = sorted(range(len(prompts)), key=lambda i: _hash(seed, "choose", prompts[i].id))[:number]
    return [prompts[i] for i in sorted(drawn)]


def _hash(seed: int, purpose: str, row_id: str) -> int:
    """64 bits that depend on the arguments alone, so that a row is always answered in the same way."""
    key = f"{seed}\0{purpose}\0{row_id}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "big")


class Conversation:
    """One row on its way: the turn that is being answered, and its tokens so far."""

    def __init__(self, prompt: Prompt, sampling: Sampling) -> None:
        self.prompt = prompt
        greedy = _hash(sampling.seed, "greedy", prompt.id) < sampling.greedy_share * 2**64
        self.params = SamplingParams(
            max_tokens=sampling.max_tokens,
            temperature=0.0 if greedy else sampling.temperature,
            seed=_hash(sampling.seed, "draw", prompt.id),
        )
        self.messages: list[dict[str, Any]] = []
        self._pending: list[dict[str, Any]] = []  # taken up, not asked yet
        self.num_tokens = 0
        self._asked = deque(prompt.messages)
        self._num_unasked = 0  # user turns
        self._answer: list[int] = []
        self._text = ""  # the prompt being answered; later with its answer, as training repeats it

    def next_turn(self, tokenizer: ChatTokenizer, info: ModelInfo) -> AddRequest | None:
        """Take up the next user turn; None where all are answered. Raises FailedError."""
        while self._asked:
            message = self._asked.popleft()
            if message["role"] not in _ASKED_ROLES:
                raise FailedError("unsupported role", f"messages of role {message['role']!r} are not asked")
            self._pending.append(message)
            if message["role"] == "user":
                return self._ask(tokenizer, info)
        if not self.num_tokens:
            raise FailedError("no user turn", "no message has the role user")
        return None

    def _ask(self, tokenizer: ChatTokenizer, info: ModelInfo) -> AddRequest | None:
        """The request of the pending turn. None where it cannot continue what was said."""
        messages = [*self.messages, *self._pending]
        try:
            text = tokenizer.render_chat(messages)
            token_ids = tokenizer.encode_chat(messages)
        except RequestError as error:
            raise FailedError("template error", str(error)) from error
        too_long = len(token_ids) >= info.max_model_len
        if too_long and not self.num_tokens:
            detail = f"{len(token_ids)} tokens; the context has {info.max_model_len} with the answer"
            raise FailedError("prompt too long", detail)
        if too_long or not text.startswith(self._text):
            self._end_early(1)
            return None
        self._text, self.messages, self._pending = text, messages, []
        return AddRequest(self.prompt.id, token_ids, self.params)

    def _end_early(self, num_taken_up: int) -> None:
        self._num_unasked = num_taken_up + sum(message["role"] == "user" for message in self._asked)
        self._asked.clear()

    def take(self, output: RequestOutput, tokenizer: ChatTokenizer) -> None:
        """Take in one step's tokens. The answer joins the messages when it ends. Raises FailedError."""
        self._answer += output.token_ids
        if output.finish_reason is None:
            return
        if output.finish_reason == "abort":
            raise FailedError("engine error", "the pass failed; the log above has the cause")
        ended = output.stop_token_id is not None
        # Special tokens in the middle stay: heads have to guess them too.
        text = tokenizer.decode(self._answer[:-1] if ended else self._answer, skip_special_tokens=False)
        if not ended:
            text = text.rstrip("\N{REPLACEMENT CHARACTER}")  # the answer was cut in the middle of a character
            self._end_early(0)
        if not text.strip():
            raise FailedError("empty answer", f"{len(self._answer)} tokens without text")
        self.messages.append({"role": "assistant", "content": text})
        self._text += text + (tokenizer.eos_token or "")
        self.num_tokens += len(self._answer)
        self._answer = []

    def named(self) -> dict[str, Any]:
        category = {} if self.prompt.category is None else {"category": self.prompt.category}
        return {"id": self.prompt.id, **category}

    def row(self, finish_reason: str) -> dict[str, Any]:
        """The row as it is written; `unasked` is there where user turns were left out."""
        unasked = {"unasked": self._num_unasked} if self._num_unasked else {}
        return {
            **self.named(),
            "temperature": self.params.temperature,
            "messages": self.messages,
            "finish_reason": finish_reason,
            "tokens": self.num_tokens,
            **unasked,
        }
