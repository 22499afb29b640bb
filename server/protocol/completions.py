"""POST /v1/completions: what comes in, what goes out."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from server.protocol.common import Finish, Many, SamplingFields, TokenId, Unsupported, Usage, Whole


def _prompt(value: object) -> object:
    """Take the prompt out of a list of one. Its type is checked here, because a union's errors would say it
    twice."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], (str, list)):
        value = value[0]
    if isinstance(value, list) and value and isinstance(value[0], (str, list)):
        raise PydanticCustomError(
            "one_prompt", "one prompt per request: send a string or one list of token ids"
        )
    if not isinstance(value, (str, list)):
        raise PydanticCustomError("prompt_type", "should be a string or a list of token ids")
    if not value:
        raise PydanticCustomError("empty_prompt", "must not be empty")
    return value


def _prompt_kind(value: object) -> str:
    return "<text>" if isinstance(value, str) else "<ids>"


# The tags in angle brackets do not appear in the paths that errors name.
Prompt = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[Many[TokenId], Tag("<ids>")],
    Discriminator(_prompt_kind),
]


class CompletionRequest(SamplingFields):
    prompt: Annotated[Prompt, BeforeValidator(_prompt)]
    echo: bool | None = None
    logprobs: Whole | None = Field(None, ge=0, le=5)
    suffix: Unsupported = None

    @model_validator(mode="after")
    def _consistent(self) -> CompletionRequest:
        if self.echo and self.logprobs is not None:
            raise PydanticCustomError(
                "echo_logprobs",
                "echo together with 'logprobs' is not supported by this server",
                {"param": "echo"},
            )
        return self


class CompletionLogprobs(BaseModel):
    """Parallel lists, one element a token; `text_offset` counts characters from the start of the text."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int = 0
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Finish | None = None


class Completion(BaseModel):
    """The answer, and each event of a stream; the last event, when usage was asked for, has no choices."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
