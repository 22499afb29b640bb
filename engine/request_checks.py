"""Refuses requests that the model cannot run, before the scheduler sees them."""

from __future__ import annotations

from engine.errors import RequestError
from engine.messages import MAX_LISTED_TOKENS, AddRequest, ModelInfo


def check_request(request: AddRequest, info: ModelInfo) -> None:
    """Raises RequestError, which names the parameter at fault."""
    prompt, sampling = request.prompt_token_ids, request.sampling
    if not prompt:
        raise RequestError("prompt", "The prompt is empty; it needs at least one token.")
    if len(prompt) >= info.max_model_len:
        raise RequestError(
            "prompt",
            f"The prompt has {len(prompt)} tokens; the context has {info.max_model_len} with the answer.",
        )
    for name, ids in (
        ("prompt", prompt),
        ("logit_bias", sampling.logit_bias),
        ("stop_token_ids", sampling.stop_token_ids),
    ):
        if ids and (min(ids) < 0 or max(ids) >= info.vocab_size):
            raise RequestError(name, f"Token ids in {name} must be 0 to {info.vocab_size - 1}.")
    for name, count in (
        ("logit_bias", len(sampling.logit_bias)),
        ("stop_token_ids", len(sampling.stop_token_ids) + len(info.eos_token_ids)),
    ):
        if count > MAX_LISTED_TOKENS:
            raise RequestError(name, f"{name} may list at most {MAX_LISTED_TOKENS} tokens.")
    if sampling.max_tokens < 1:
        raise RequestError("max_tokens", "max_tokens must be at least 1.")
    if (sampling.logprobs or 0) > info.vocab_size:
        raise RequestError(
            "logprobs", f"The vocabulary has {info.vocab_size} tokens; ask for fewer logprobs."
        )
