"""POST /v1/chat/completions."""

from __future__ import annotations

import asyncio
import time
import uuid
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from engine.messages import TokenLogprobs
from server.api.bodies import json_response, read_json
from server.generation import Generation, Piece
from server.logprobs import TokenTexts, finite
from server.protocol.chat import (
    AnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatRequest,
    TokenLogprob,
    TopLogprob,
)
from server.sampling import check_model, resolve_max_tokens, sampling_params
from server.services import cache_scope, services
from server.streaming import ChunkWriter, collect, stream

router = APIRouter()


@router.post("/v1/chat/completions", response_model=None)
async def create_chat_completion(request: Request) -> Response:
    """Answer a conversation, at once or as a stream."""
    arrived = time.monotonic()
    service = services(request)
    chat = await read_json(request, ChatRequest)
    model = service.settings.served_model_name
    check_model(chat.model, model)
    messages = [message.for_template() for message in chat.messages]
    # Rendering a long conversation takes a while, and other streams must not wait for it.
    prompt = await asyncio.to_thread(service.tokenizer.encode_chat, messages)

    max_tokens = resolve_max_tokens(
        service.engine.info,
        len(prompt),
        chat.max_completion_tokens or chat.max_tokens,
        prompt_param="messages",
        limit_param=chat.limit_field,
    )
    logprobs = (chat.top_logprobs or 0) if chat.logprobs else None
    sampling = sampling_params(chat, service.engine.info, max_tokens, logprobs)
    request_id = f"chatcmpl-{uuid.uuid4().hex}"
    generation = Generation(
        service, request_id, request.state.request_id, chat, prompt, sampling, arrived, cache_scope(request)
    )
    head: dict[str, Any] = {"id": request_id, "created": int(time.time()), "model": model}
    if chat.stream:
        return await stream(request, generation, _Chunks(head, chat, service.token_texts))

    pieces = await collect(request, generation)
    assert generation.finish_reason is not None  # collect read to the end
    entries = [entry for piece in pieces for _, entry in piece.logprobs]
    choice = ChatChoice(
        message=AnswerMessage(content="".join(piece.text for piece in pieces)),
        logprobs=_logprobs(entries, service.token_texts) if chat.logprobs else None,
        finish_reason=generation.finish_reason,
    )
    return json_response(ChatCompletion(**head, choices=[choice], usage=generation.usage))


class _Chunks(ChunkWriter):
    """head: what every chunk begins with."""

    def __init__(self, head: dict[str, Any], chat: ChatRequest, texts: TokenTexts) -> None:
        super().__init__(chat.stream_options)
        self._head, self._chat, self._texts = head, chat, texts

    def first(self) -> list[BaseModel]:
        return [self._chunk(ChatChunkChoice(delta={"role": "assistant", "content": ""}))]

    def piece(self, piece: Piece) -> BaseModel:
        entries = [entry for _, entry in piece.logprobs]
        logprobs = _logprobs(entries, self._texts) if self._chat.logprobs else None
        return self._chunk(ChatChunkChoice(delta={"content": piece.text}, logprobs=logprobs))

    def end(self, generation: Generation) -> BaseModel:
        return self._chunk(ChatChunkChoice(delta={}, finish_reason=generation.finish_reason))

    def usage(self, generation: Generation) -> BaseModel:
        return ChatChunk(**self._head, choices=[], usage=generation.usage)

    def _chunk(self, choice: ChatChunkChoice) -> ChatChunk:
        return ChatChunk(**self._head, choices=[choice])


def _logprobs(entries: list[TokenLogprobs], texts: TokenTexts) -> ChatLogprobs:
    def named(token_id: int, logprob: float) -> TopLogprob:
        raw = texts.bytes_of(token_id)
        return TopLogprob(
            token=texts[token_id], logprob=finite(logprob), bytes=None if raw is None else list(raw)
        )

    return ChatLogprobs(
        content=[
            TokenLogprob(
                **named(entry.token_id, entry.logprob).model_dump(),
                top_logprobs=[named(*alternative) for alternative in entry.top],
            )
            for entry in entries
        ]
    )
