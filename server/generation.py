"""One request's way through the engine and back to text: pieces of the answer, its usage and how it ended."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from functools import partial

import anyio

from engine.errors import EngineDeadError, RequestError, RequestMemoryError
from engine.messages import RequestOutput, RequestUsage, SamplingParams, TokenLogprobs
from engine.text.detokenizer import TextAssembler
from server.errors import GenerationError
from server.protocol.common import CompletionTokensDetails, Finish, PromptTokensDetails, SamplingFields, Usage
from server.services import Services

logger = logging.getLogger("gorgon.server")

_NO_USAGE = RequestUsage(cached_tokens=0, decode_steps=0, drafted_tokens=0, accepted_tokens=0)


@dataclass(frozen=True)
class Piece:
    """Text that became certain, and the log-probabilities of its tokens with their places in the text."""

    text: str
    logprobs: list[tuple[int, TokenLogprobs]] = field(default_factory=list)


class Generation:
    """Runs one request. Read `pieces()` to the end, or close it to abort the request.

    `request_id` is the answer's own. `http_request_id` is the one that the client's logs may hold.
    """

    def __init__(
        self,
        services: Services,
        request_id: str,
        http_request_id: str,
        request: SamplingFields,
        prompt_token_ids: list[int],
        sampling: SamplingParams,
        arrived: float,
        cache_scope: str,
    ) -> None:
        self.request_id = request_id
        self.http_request_id = http_request_id
        self.finish_reason: Finish | None = None
        self._services = services
        self._request = request
        self._num_prompt = len(prompt_token_ids)
        self._outputs = services.engine.generate(request_id, prompt_token_ids, sampling, cache_scope)
        self._include_stop = bool(request.include_stop_str_in_output)
        skip_special = request.skip_special_tokens is not False
        decode = partial(services.tokenizer.decode, skip_special_tokens=skip_special)
        self._assembler = TextAssembler(
            decode, request.stop or (), self._include_stop, min_tokens=sampling.min_tokens
        )
        self._waiting: deque[tuple[int, TokenLogprobs]] = deque()  # their text is not out yet
        self._num_tokens = 0
        self._dropped = 0  # accepted tokens behind a stop string
        self._engine_usage = _NO_USAGE
        self._arrived = arrived
        self._last_output: float | None = None
        self._outcome = "abort"

    @property
    def usage(self) -> Usage:
        """Totals so far; tokens behind a stop string do not count."""
        accepted = max(0, self._engine_usage.accepted_tokens - self._dropped)
        return Usage(
            prompt_tokens=self._num_prompt,
            completion_tokens=self._num_tokens,
            total_tokens=self._num_prompt + self._num_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=self._engine_usage.cached_tokens),
            completion_tokens_details=CompletionTokensDetails(
                accepted_prediction_tokens=accepted,
                rejected_prediction_tokens=max(0, self._engine_usage.drafted_tokens - accepted),
            ),
            decode_steps=self._engine_usage.decode_steps,
        )

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """One piece for each step. Raises what `Engine.generate` raises, GenerationError and
        RequestMemoryError.

        The engine's generator is always closed at the end, so that the request holds no blocks afterwards.
        """
        try:
            async for output in self._outputs:
                self._observe_time(len(output.token_ids))
                piece = self._take(output)
                if self.finish_reason is not None:
                    self._outcome = self.finish_reason
                yield piece
                if self.finish_reason is not None:
                    return
            raise EngineDeadError("The engine ended a request without an answer.")
        except RequestError as error:
            self._outcome = "error"
            raise RequestError(self._request.field_of(error.parameter), str(error)) from error
        except Exception:
            self._outcome = "error"
            raise
        finally:
            with anyio.CancelScope(shield=True):
                await self._outputs.aclose()
            self._record()

    def _take(self, output: RequestOutput) -> Piece:
        """Add one step's tokens. The last step sets `finish_reason`."""
        if output.failure == "out_of_memory":
            raise RequestMemoryError(
                "The engine has no memory for this request; send a shorter one, or try again later."
            )
        if output.finish_reason == "abort":
            raise GenerationError("The engine gave the request up.")
        self._engine_usage = output.usage
        text = ""
        last = len(output.token_ids) - 1
        for index, token_id in enumerate(output.token_ids):
            self._num_tokens += 1
            if index == last and output.stop_token_id is not None and not self._include_stop:
                break
            if output.logprobs is not None:
                self._waiting.append((self._assembler.decoded, output.logprobs[index]))
            text += self._assembler.push(token_id)
            if self._assembler.stopped is not None:
                # The step's last token was drawn, not drafted; all before it were accepted drafts.
                self._dropped = max(0, last - 1 - index)
                break
        if output.finish_reason in ("stop", "length") and self._assembler.stopped is None:
            text += self._assembler.finish()
            self.finish_reason = "length" if output.finish_reason == "length" else "stop"
        if self._assembler.stopped is not None:
            self.finish_reason = "stop"
        return Piece(text, self._visible_logprobs())

    def _visible_logprobs(self) -> list[tuple[int, TokenLogprobs]]:
        everything = self.finish_reason is not None and self._assembler.stopped is None
        visible = []
        while self._waiting and (everything or self._waiting[0][0] < self._assembler.emitted):
            visible.append(self._waiting.popleft())
        return visible

    def _observe_time(self, num_tokens: int) -> None:
        now = time.monotonic()
        metrics = self._services.metrics
        if self._last_output is None:
            metrics.time_to_first_token.observe(now - self._arrived)
            metrics.prompt_tokens.inc(self._num_prompt)
        elif num_tokens:
            metrics.on_tokens(num_tokens, now - self._last_output)
        self._last_output = now

    def _record(self) -> None:
        metrics = self._services.metrics
        seconds = time.monotonic() - self._arrived
        metrics.requests.labels(self._outcome).inc()
        metrics.generation_tokens.inc(self._num_tokens)
        metrics.e2e_latency.observe(seconds)
        logger.info(
            "%s %s: %d prompt tokens, %d tokens in %d steps, %.2f s, user %r; request %s",
            self.request_id,
            self._outcome,
            self._num_prompt,
            self._num_tokens,
            self._engine_usage.decode_steps,
            seconds,
            self._request.user,
            self.http_request_id,
        )
