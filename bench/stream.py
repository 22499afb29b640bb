"""One streamed chat completion, timed as its client sees it, from any OpenAI-compatible server."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from bench.prompts import Prompt
from engine.errors import GorgonError

OVERLOADED = (429, 503)


class BenchError(GorgonError):
    """The server cannot be reached, or refuses a request; nothing was measured."""


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What every request of a load asks for besides its prompt. Answers are greedy.

    `ignore_eos` makes all answers equally long on servers that know it (ours, vLLM, llama.cpp); it is sent
    only where it is set, because others may refuse a parameter they do not know.
    """

    model: str
    max_tokens: int
    ignore_eos: bool = False

    def body(self, prompt: Prompt) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": prompt.messages,
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return body | {"ignore_eos": True} if self.ignore_eos else body


@dataclass
class Answer:
    """One request as it goes. Times are in seconds since it was sent.

    `tokens` counts chunks with text until the server tells its usage: without usage, a chunk is the closest
    thing to a token that can be counted. `seconds` is None while the answer runs. `refused`: the server said
    that it is overloaded. `steps`: passes that committed tokens, None where the server does not tell.
    """

    first_token: float | None = None
    seconds: float | None = None
    tokens: int = 0
    prompt_tokens: int | None = None
    steps: int | None = None
    refused: bool = False

    @property
    def per_token(self) -> float | None:
        """Seconds per token after the first; None where there is none, or the answer still runs."""
        if self.seconds is None or self.first_token is None or self.tokens < 2:
            return None
        return (self.seconds - self.first_token) / (self.tokens - 1)


async def stream_answer(
    client: httpx.AsyncClient, ask: Ask, prompt: Prompt, answer: Answer, *, count_refusals: bool = False
) -> None:
    """Fill in `answer` while it streams.

    Raises BenchError if the server refuses the request, unless the server is overloaded and `count_refusals`
    takes this as a result.
    """
    start = time.perf_counter()
    async with client.stream("POST", "/v1/chat/completions", json=ask.body(prompt)) as response:
        if count_refusals and response.status_code in OVERLOADED:
            answer.refused, answer.seconds = True, time.perf_counter() - start
            return
        if response.is_error:
            text = (await response.aread()).decode(errors="replace")
            raise BenchError(f"prompt {prompt.id}: the server answered {response.status_code}: {text[:300]}")
        usage: Mapping[str, Any] = {}
        timings: Mapping[str, Any] = {}
        async for line in response.aiter_lines():
            if not line.startswith("data:") or (data := line.removeprefix("data:").strip()) == "[DONE]":
                continue
            event = json.loads(data)
            if error := event.get("error"):
                message = error.get("message") if isinstance(error, dict) else error
                raise BenchError(f"prompt {prompt.id}: {message}")
            usage = event.get("usage") or usage
            timings = event.get("timings") or timings
            if any(choice["delta"].get("content") for choice in event.get("choices", ())):
                answer.tokens += 1
                if answer.first_token is None:
                    answer.first_token = time.perf_counter() - start
    answer.tokens = usage.get("completion_tokens", answer.tokens)
    answer.prompt_tokens = usage.get("prompt_tokens")
    answer.steps = _steps(usage, timings, answer.tokens)
    answer.seconds = time.perf_counter() - start


def _steps(usage: Mapping[str, Any], timings: Mapping[str, Any], tokens: int) -> int | None:
    """From our usage, or from llama.cpp's count of accepted drafts: all other tokens took a pass each."""
    if (steps := usage.get("decode_steps")) is not None:
        return int(steps)
    if (accepted := timings.get("draft_n_accepted")) is not None:
        return tokens - int(accepted)
    return None


async def first_model(client: httpx.AsyncClient) -> str:
    """The name of the first model that the server lists. Raises BenchError where it lists none."""
    response = await client.get("/v1/models")
    if response.is_error:
        raise BenchError(f"the server answered {response.status_code} to GET /v1/models; give --model")
    models = response.json().get("data")
    if not models:
        raise BenchError("the server lists no models; give --model")
    return str(models[0]["id"])
