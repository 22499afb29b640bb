"""What chat and text completions share: strict parsing, sampling fields, usage.

Every limit here bounds the cost of a request before anything is allocated for it. An unsupported field that
would change the answer is refused by name. A field that changes nothing here is accepted.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from engine.messages import SpeculationParams
from trees.family import MAX_DRAFT_NODES

MAX_FIELDS = 100
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256
MAX_STOP_TOKEN_IDS = 64
MAX_LOGIT_BIAS = 1024
MAX_METADATA = 16  # OpenAI's
MAX_TOKENS = 2**31 - 1
MAX_SEED = 2**63
_DEFAULTS = SpeculationParams()

T = TypeVar("T")
# Stop at the first bad element: a list may have a million of them.
Many = Annotated[list[T], Field(fail_fast=True)]


def _unsupported(value: object) -> object:
    raise PydanticCustomError("not_supported", "is not supported by this server")


def only(*values: object) -> BeforeValidator:
    """Take these values, which change nothing here, and refuse all others."""
    shown = " or ".join(map(json.dumps, values))

    def check(value: object) -> object:
        # In Python, true equals 1.
        if not any(value == known and isinstance(value, bool) == isinstance(known, bool) for known in values):
            # The message is a template, which cannot hold literal braces.
            raise PydanticCustomError("only", "only {shown} is supported by this server", {"shown": shown})
        return value

    return BeforeValidator(check)


def _whole(value: object) -> object:
    """Some languages write a whole number as 4.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _stop_list(value: object) -> object:
    if isinstance(value, str):
        return [value] if value else []
    return value


def _small_bias(value: object) -> object:
    if isinstance(value, dict) and len(value) > MAX_LOGIT_BIAS:
        raise PydanticCustomError("too_long", f"at most {MAX_LOGIT_BIAS} tokens can be biased")
    return value


Unsupported = Annotated[Any, BeforeValidator(_unsupported)]
Whole = Annotated[int, BeforeValidator(_whole)]
ShortText = Annotated[str, Field(max_length=512)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class Strict(BaseModel):
    """Base of all request models: unknown fields, NaN and converted types are errors. Null means left out."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _bounded(cls, value: object) -> object:
        # Each unknown field makes an error with a text of its own. Thousands of them would fill the memory.
        if isinstance(value, dict) and len(value) > MAX_FIELDS:
            raise PydanticCustomError("too_many_fields", f"an object has at most {MAX_FIELDS} fields")
        if isinstance(value, dict):
            return {name: field for name, field in value.items() if field is not None}
        return value


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class SpeculationOptions(Strict):
    """Our extension: how this request speculates."""

    enabled: bool = True
    # Also taken by its first name, `max_nodes`. Nodes include the root everywhere else, and this does not.
    max_draft_tokens: Whole | None = Field(
        None, ge=0, le=MAX_DRAFT_NODES, validation_alias=AliasChoices("max_draft_tokens", "max_nodes")
    )
    acceptance: Literal["exact", "typical"] = "exact"
    epsilon: float = Field(_DEFAULTS.epsilon, ge=0, le=1)
    delta: float = Field(_DEFAULTS.delta, ge=0, le=1)


class IdleFields(Strict):
    """Fields that clients of OpenAI or vLLM send and that change no answer here: accepted, but not used."""

    metadata: Annotated[dict[str, ShortText], Field(max_length=MAX_METADATA)] | None = None
    store: bool | None = None  # nothing is stored
    safety_identifier: ShortText | None = None
    service_tier: Literal["auto", "default", "flex", "scale", "priority"] | None = None
    prompt_cache_key: ShortText | None = None  # prefixes are found without it
    prompt_cache_retention: ShortText | None = None

    n: Annotated[Any, only(1)] = None
    best_of: Annotated[Any, only(1)] = None
    use_beam_search: Annotated[Any, only(False)] = None
    length_penalty: Annotated[Any, only(1)] = None


class SamplingFields(IdleFields):
    """Fields of both endpoints that say how tokens are drawn and when the answer ends."""

    model: ShortText | None = None
    max_tokens: Whole | None = Field(None, ge=1, le=MAX_TOKENS)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    stop: Annotated[
        Annotated[Many[StopString], Field(max_length=MAX_STOP_STRINGS)] | None, BeforeValidator(_stop_list)
    ] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    seed: Whole | None = Field(None, ge=-MAX_SEED, lt=MAX_SEED)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: Annotated[
        dict[str, Annotated[float, Field(ge=-100, le=100)]] | None, BeforeValidator(_small_bias)
    ] = None
    user: ShortText | None = None

    # As vLLM names them.
    top_k: Whole | None = Field(None, ge=-1, le=MAX_TOKENS)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    min_tokens: Whole | None = Field(None, ge=0, le=MAX_TOKENS)
    stop_token_ids: Annotated[Many[TokenId], Field(max_length=MAX_STOP_TOKEN_IDS)] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None

    speculation: SpeculationOptions | None = None

    @model_validator(mode="after")
    def _options_need_stream(self) -> SamplingFields:
        if self.stream_options is not None and self.stream_options.include_usage and not self.stream:
            raise PydanticCustomError(
                "needs_stream", "only allowed when 'stream' is true", {"param": "stream_options"}
            )
        return self

    def field_of(self, parameter: str) -> str:
        """The field of this request that the engine calls `parameter`."""
        return parameter


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
