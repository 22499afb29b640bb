"""POST /v1/completions."""

from __future__ import annotations

import asyncio
import time
import uuid
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from server.api.bodies import json_response, read_json
from server.generation import Generation, Piece
from server.logprobs import TokenTexts, finite
from server.protocol.completions import Completion, CompletionChoice, CompletionLogprobs, CompletionRequest
from server.sampling import check_model, check_token_ids, resolve_max_tokens, sampling_params
from server.services import Services, cache_scope, services
from server.streaming import ChunkWriter, collect, stream

router = APIRouter()

DEFAULT_MAX_TOKENS = 16  # OpenAI's


@router.post("/v1/completions", response_model=None)
async def create_completion(request: Request) -> Response:
    """Continue a text, at once or as a stream."""
    arrived = time.monotonic()
    service = services(request)
    body = await read_json(request, CompletionRequest)
    model = service.settings.served_model_name
    check_model(body.model, model)
    info = service.engine.info
    prompt, prompt_text = await _prompt(body, service)
    max_tokens = resolve_max_tokens(
        info, len(prompt), body.max_tokens, prompt_param="prompt", default=DEFAULT_MAX_TOKENS
    )
    sampling = sampling_params(body, info, max_tokens, body.logprobs)
    request_id = f"cmpl-{uuid.uuid4().hex}"
    generation = Generation(
        service, request_id, request.state.request_id, body, prompt, sampling, arrived, cache_scope(request)
    )
    head: dict[str, Any] = {"id": request_id, "created": int(time.time()), "model": model}
    echo = prompt_text if body.echo else ""
    if body.stream:
        return await stream(request, generation, _Chunks(head, body, service.token_texts, echo))

    pieces = await collect(request, generation)
    choice = CompletionChoice(
        text=echo + "".join(piece.text for piece in pieces),
        logprobs=None if body.logprobs is None else _logprobs(pieces, service.token_texts),
        finish_reason=generation.finish_reason,
    )
    return json_response(Completion(**head, choices=[choice], usage=generation.usage))


async def _prompt(body: CompletionRequest, service: Services) -> tuple[list[int], str]:
    """Token ids and text of the prompt. The text is made only where it is echoed."""
    tokenizer = service.tokenizer
    if isinstance(body.prompt, str):
        return await asyncio.to_thread(tokenizer.encode, body.prompt, add_special_tokens=True), body.prompt
    check_token_ids("prompt", body.prompt, service.engine.info)
    text = ""
    if body.echo:
        text = await asyncio.to_thread(tokenizer.decode, body.prompt, skip_special_tokens=True)
    return body.prompt, text


class _Chunks(ChunkWriter):
    """head: what every chunk begins with; echo: text that comes before the answer's."""

    def __init__(self, head: dict[str, Any], body: CompletionRequest, texts: TokenTexts, echo: str) -> None:
        super().__init__(body.stream_options)
        self._head, self._body, self._texts, self._echo = head, body, texts, echo

    def first(self) -> list[BaseModel]:
        return [self._chunk(CompletionChoice(text=self._echo))] if self._echo else []

    def piece(self, piece: Piece) -> BaseModel:
        logprobs = None if self._body.logprobs is None else _logprobs([piece], self._texts)
        return self._chunk(CompletionChoice(text=piece.text, logprobs=logprobs))

    def end(self, generation: Generation) -> BaseModel:
        return self._chunk(CompletionChoice(text="", finish_reason=generation.finish_reason))

    def usage(self, generation: Generation) -> BaseModel:
        return Completion(**self._head, choices=[], usage=generation.usage)

    def _chunk(self, choice: CompletionChoice) -> Completion:
        return Completion(**self._head, choices=[choice])


def _logprobs(pieces: list[Piece], texts: TokenTexts) -> CompletionLogprobs:
    placed = [entry for piece in pieces for entry in piece.logprobs]
    return CompletionLogprobs(
        tokens=[texts.name(entry.token_id) for _, entry in placed],
        token_logprobs=[finite(entry.logprob) for _, entry in placed],
        top_logprobs=[
            {texts.name(token_id): finite(logprob) for token_id, logprob in reversed(entry.top)}
            | {texts.name(entry.token_id): finite(entry.logprob)}
            for _, entry in placed
        ],
        text_offset=[offset for offset, _ in placed],
    )
