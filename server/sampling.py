"""Checks a request against the model it is for, and translates it for the engine."""

from __future__ import annotations

from collections.abc import Sequence

from engine.messages import ModelInfo, SamplingParams, SpeculationParams
from server.errors import ApiError, invalid
from server.protocol.common import SamplingFields

MAX_TOKEN_ID_DIGITS = 9


def check_model(name: str | None, served: str) -> None:
    """Raises a 404 in OpenAI's shape for any model but the served one. A request without a name means that
    one."""
    if name and name != served:
        raise ApiError(
            404,
            f"The model {name[:200]!r} does not exist here; this server has {served!r}.",
            param="model",
            code="model_not_found",
        )


def resolve_max_tokens(
    info: ModelInfo,
    num_prompt: int,
    asked: int | None,
    *,
    prompt_param: str,
    limit_param: str = "max_tokens",
    default: int | None = None,
) -> int:
    """How many tokens the answer may have: the number asked for, or `default`, or what the context leaves."""
    room = info.max_model_len - num_prompt
    if num_prompt == 0:
        raise invalid(prompt_param, f"'{prompt_param}' has no tokens; send at least one.")
    if room < 1:
        raise invalid(
            prompt_param,
            f"This model's context is {info.max_model_len} tokens, and '{prompt_param}' has {num_prompt}; "
            f"shorten it to {info.max_model_len - 1} or fewer.",
            "context_length_exceeded",
        )
    if asked is None:
        return room if default is None else min(default, room)
    if asked > room:
        raise invalid(
            limit_param,
            f"'{limit_param}' is {asked}, but {num_prompt} prompt tokens leave {room} of this model's "
            f"{info.max_model_len} tokens of context; ask for {room} or fewer.",
            "context_length_exceeded",
        )
    return asked


def check_token_ids(param: str, token_ids: Sequence[int], info: ModelInfo) -> None:
    """Raises a 400 for an id outside the vocabulary."""
    highest = max(token_ids, default=0)
    if highest >= info.vocab_size:
        raise invalid(
            param, f"Token id {highest} in '{param}' is not in the vocabulary of {info.vocab_size}."
        )


def _logit_bias(bias: dict[str, float], info: ModelInfo) -> dict[int, float]:
    biased: dict[int, float] = {}
    for key, value in bias.items():
        if not (key.isascii() and key.isdigit() and len(key) <= MAX_TOKEN_ID_DIGITS):
            raise invalid("logit_bias", f"'logit_bias' has the key {key[:40]!r}; keys are token ids.")
        biased[int(key)] = value
    check_token_ids("logit_bias", list(biased), info)
    return biased


def _speculation(request: SamplingFields) -> SpeculationParams:
    asked = request.speculation
    if asked is None:
        return SpeculationParams()
    return SpeculationParams(
        enabled=asked.enabled,
        max_draft_tokens=asked.max_draft_tokens,
        acceptance=asked.acceptance,
        epsilon=asked.epsilon,
        delta=asked.delta,
    )


def sampling_params(
    request: SamplingFields, info: ModelInfo, max_tokens: int, logprobs: int | None
) -> SamplingParams:
    """The engine's view of a request; null means the default everywhere."""
    min_tokens = request.min_tokens or 0
    if min_tokens > max_tokens:
        raise invalid(
            "min_tokens", f"'min_tokens' is {min_tokens}, more than the {max_tokens} tokens allowed."
        )
    stop_token_ids = tuple(request.stop_token_ids or ())
    check_token_ids("stop_token_ids", stop_token_ids, info)
    top_k = request.top_k or 0
    greedy = request.top_p == 0  # the likeliest token alone is left
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=0.0 if greedy else 1.0 if request.temperature is None else request.temperature,
        top_p=1.0 if greedy or request.top_p is None else request.top_p,
        top_k=max(top_k, 0),
        min_p=request.min_p or 0.0,
        seed=None if request.seed is None else request.seed % 2**64,
        frequency_penalty=request.frequency_penalty or 0.0,
        presence_penalty=request.presence_penalty or 0.0,
        repetition_penalty=1.0 if request.repetition_penalty is None else request.repetition_penalty,
        logit_bias=_logit_bias(request.logit_bias or {}, info),
        stop_token_ids=stop_token_ids,
        ignore_eos=bool(request.ignore_eos),
        logprobs=logprobs,
        speculation=_speculation(request),
    )
