"""POST /v1/chat/completions: what comes in, what goes out."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from server.protocol.common import (
    MAX_TOKENS,
    Finish,
    Many,
    SamplingFields,
    Strict,
    Unsupported,
    Usage,
    unsupported,
)


def _text_part(value: object) -> object:
    if isinstance(value, dict) and isinstance(kind := value.get("type"), str) and kind != "text":
        raise PydanticCustomError(
            "not_text", "content of type '{kind}' is not supported; send text", {"kind": kind[:40]}
        )
    return value


class TextPart(Strict):
    type: Literal["text"]
    text: str


def _parts(value: object) -> object:
    if isinstance(value, str):
        return [TextPart(type="text", text=value)]
    if not isinstance(value, list):
        raise PydanticCustomError("content_type", "should be a string or a list of text parts")
    return value


def _role(value: object) -> object:
    if value in ("tool", "function"):
        raise PydanticCustomError("role", "messages of role '{role}' are not supported", {"role": value})
    return value


class ChatMessage(Strict):
    """One message. The fields of an answer may come back with it as long as they hold nothing."""

    role: Annotated[Literal["system", "developer", "user", "assistant"], BeforeValidator(_role)]
    content: Annotated[Many[Annotated[TextPart, BeforeValidator(_text_part)]], BeforeValidator(_parts)]
    name: str | None = Field(None, max_length=512)
    refusal: Unsupported = None
    annotations: Unsupported = None
    audio: Unsupported = None
    function_call: Unsupported = None
    tool_calls: Unsupported = None
    tool_call_id: Unsupported = None

    def for_template(self) -> dict[str, str]:
        """The message as the model's chat template reads it; several text parts become lines."""
        message = {"role": self.role, "content": "\n".join(part.text for part in self.content)}
        if self.name is not None:
            message["name"] = self.name
        return message


def _none_choice(value: object) -> object:
    return None if value == "none" else unsupported(value)


def _text_modality(value: object) -> object:
    return None if value == ["text"] else unsupported(value)


def _no_store(value: object) -> object:
    return None if value is False else unsupported(value)


def _text_format(value: object) -> object:
    if value not in (None, {"type": "text"}):
        # The message is a template, which takes no literal braces.
        only = {"format": '{"type": "text"}'}
        raise PydanticCustomError("only_text", "only {format} is supported by this server", only)
    return value


class ChatRequest(SamplingFields):
    messages: Many[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    safety_identifier: str | None = Field(None, max_length=512)
    response_format: Annotated[Any, BeforeValidator(_text_format)] = None
    modalities: Annotated[Any, BeforeValidator(_text_modality)] = None
    tool_choice: Annotated[Any, BeforeValidator(_none_choice)] = None
    store: Annotated[Any, BeforeValidator(_no_store)] = None
    service_tier: Literal["auto", "default"] | None = None

    audio: Unsupported = None
    function_call: Unsupported = None
    functions: Unsupported = None
    metadata: Unsupported = None
    moderation: Unsupported = None
    parallel_tool_calls: Unsupported = None
    prediction: Unsupported = None
    prompt_cache_key: Unsupported = None
    prompt_cache_options: Unsupported = None
    prompt_cache_retention: Unsupported = None
    reasoning_effort: Unsupported = None
    tools: Unsupported = None
    verbosity: Unsupported = None
    web_search_options: Unsupported = None

    @model_validator(mode="after")
    def _consistent(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError(
                "needs_logprobs", "only allowed when 'logprobs' is true", {"param": "top_logprobs"}
            )
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise PydanticCustomError(
                "two_limits", "it contradicts 'max_completion_tokens'; send only one", {"param": "max_tokens"}
            )
        return self


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None = None


class AnswerMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    index: int = 0
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Finish


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChatChunkChoice(BaseModel):
    """`delta` has `role` in the first chunk and `content` where there is new text."""

    index: int = 0
    delta: dict[str, str]
    logprobs: ChatLogprobs | None = None
    finish_reason: Finish | None = None


class ChatChunk(BaseModel):
    """One event of a stream; the last one, when usage was asked for, has it and no choices."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
