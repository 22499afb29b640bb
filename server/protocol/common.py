"""What chat and text completions share: strict parsing, sampling fields, usage.

Every limit here keeps a request's cost bounded before anything is allocated for it. A field of OpenAI's that
does nothing here is refused by name instead of ignored in silence.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from engine.config import MAX_TREE_NODES

MAX_FIELDS = 100
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256
MAX_STOP_TOKEN_IDS = 64
MAX_LOGIT_BIAS = 1024
MAX_TOKENS = 2**31 - 1
MAX_SEED = 2**63

T = TypeVar("T")
# One bad element is enough: a list of a million is not reported in full.
Many = Annotated[list[T], Field(fail_fast=True)]


def unsupported(value: object) -> object:
    """Refuse anything but null."""
    if value is not None:
        raise PydanticCustomError("not_supported", "is not supported by this server")
    return value


def _one(value: int | None) -> int | None:
    if value not in (None, 1):
        raise PydanticCustomError("only_one", "only 1 is supported by this server")
    return value


def _stop_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _small_bias(value: object) -> object:
    if isinstance(value, dict) and len(value) > MAX_LOGIT_BIAS:
        raise PydanticCustomError("too_long", f"at most {MAX_LOGIT_BIAS} tokens can be biased")
    return value


Unsupported = Annotated[Any, BeforeValidator(unsupported)]
OnlyOne = Annotated[int | None, AfterValidator(_one)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class Strict(BaseModel):
    """Base of everything that comes in: unknown fields, NaN and converted types are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _bounded(cls, value: object) -> object:
        # Each unknown field is one error with its own text; thousands of them are an attack on memory.
        if isinstance(value, dict) and len(value) > MAX_FIELDS:
            raise PydanticCustomError("too_many_fields", f"an object has at most {MAX_FIELDS} fields")
        return value


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class SpeculationOptions(Strict):
    """Our extension: how this request speculates. `max_nodes` counts draft tokens besides the root."""

    enabled: bool = True
    max_nodes: int | None = Field(None, ge=0, le=MAX_TREE_NODES - 1)
    acceptance: Literal["exact", "typical"] = "exact"
    epsilon: float = Field(0.09, ge=0, le=1)
    delta: float = Field(0.3, ge=0, le=1)


class SamplingFields(Strict):
    """Fields of both endpoints that say how tokens are drawn and when the answer ends."""

    model: str = Field(max_length=512)
    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    n: OnlyOne = None
    stop: Annotated[
        Annotated[Many[StopString], Field(max_length=MAX_STOP_STRINGS)] | None, BeforeValidator(_stop_list)
    ] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    seed: int | None = Field(None, ge=-MAX_SEED, lt=MAX_SEED)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: Annotated[
        dict[str, Annotated[float, Field(ge=-100, le=100)]] | None, BeforeValidator(_small_bias)
    ] = None
    user: str | None = Field(None, max_length=512)

    # As vLLM names them.
    top_k: int | None = Field(None, ge=-1, le=MAX_TOKENS)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    min_tokens: int | None = Field(None, ge=0, le=MAX_TOKENS)
    stop_token_ids: Annotated[Many[TokenId], Field(max_length=MAX_STOP_TOKEN_IDS)] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None

    speculation: SpeculationOptions | None = None

    @model_validator(mode="after")
    def _options_need_stream(self) -> SamplingFields:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError(
                "needs_stream", "only allowed when 'stream' is true", {"param": "stream_options"}
            )
        return self


class PromptTokensDetails(BaseModel):
    cached_tokens: int


class CompletionTokensDetails(BaseModel):
    accepted_prediction_tokens: int
    rejected_prediction_tokens: int
    reasoning_tokens: int = 0


class Usage(BaseModel):
    """OpenAI's usage; `decode_steps` is ours: forward passes that committed tokens of this answer."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails
    decode_steps: int


Finish = Literal["stop", "length"]
