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
    Whole,
    only,
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
    """One message.

    Clients may send an answer back with all its fields, as long as the unsupported ones are empty. An
    assistant's message may have no content; every other role needs one.
    """

    role: Annotated[Literal["system", "developer", "user", "assistant"], BeforeValidator(_role)]
    content: (
        Annotated[Many[Annotated[TextPart, BeforeValidator(_text_part)]], BeforeValidator(_parts)] | None
    ) = None
    name: str | None = Field(None, max_length=512)
    type: Annotated[Any, only("text", "message")] = None
    refusal: Unsupported = None
    annotations: Annotated[Any, only([])] = None
    audio: Unsupported = None
    function_call: Unsupported = None
    tool_calls: Annotated[Any, only([])] = None
    tool_call_id: Unsupported = None

    @model_validator(mode="after")
    def _says_something(self) -> ChatMessage:
        if self.content is None and self.role != "assistant":
            raise PydanticCustomError("missing", "missing", {"param": "content"})
        return self

    def for_template(self) -> dict[str, str]:
        """The message as the model's chat template reads it; several text parts become lines."""
        message = {"role": self.role, "content": "\n".join(part.text for part in self.content or ())}
        if self.name is not None:
            message["name"] = self.name
        return message


class ChatRequest(SamplingFields):
    """Where both token limits are sent, the newer one, `max_completion_tokens`, counts."""

    messages: Many[ChatMessage] = Field(min_length=1)
    max_completion_tokens: Whole | None = Field(None, ge=1, le=MAX_TOKENS)
    logprobs: bool | None = None
    top_logprobs: Whole | None = Field(None, ge=0, le=20)
    response_format: Annotated[Any, only({"type": "text"})] = None
    modalities: Annotated[Any, only(["text"])] = None
    verbosity: Annotated[Any, only("medium")] = None
    add_generation_prompt: Annotated[Any, only(True)] = None
    continue_final_message: Annotated[Any, only(False)] = None
    echo: Annotated[Any, only(False)] = None

    # Without tools these have no effect.
    tools: Annotated[Any, only([])] = None
    tool_choice: Annotated[Any, only("none", "auto")] = None
    parallel_tool_calls: bool | None = None
    functions: Annotated[Any, only([])] = None
    function_call: Annotated[Any, only("none", "auto")] = None

    audio: Unsupported = None
    moderation: Unsupported = None
    prediction: Unsupported = None
    prompt_cache_options: Unsupported = None
    reasoning_effort: Unsupported = None
    web_search_options: Unsupported = None

    @model_validator(mode="after")
    def _consistent(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise PydanticCustomError(
                "needs_logprobs", "only allowed when 'logprobs' is true", {"param": "top_logprobs"}
            )
        return self

    @property
    def limit_field(self) -> str:
        """The field that limits the answer's tokens."""
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    def field_of(self, parameter: str) -> str:
        names = {"prompt": "messages", "logprobs": "top_logprobs", "max_tokens": self.limit_field}
        return names.get(parameter, parameter)


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
