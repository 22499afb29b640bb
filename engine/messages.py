"""What crosses the border between the server process and the engine process, as typed msgspec messages.

Without torch. Frames are length-prefixed msgpack (`engine.channel`); nothing is ever pickled.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from engine.config import EngineConfig

FinishReason = Literal["stop", "length", "abort"]
Failure = Literal["error", "out_of_memory"]

MAX_LISTED_TOKENS = 512  # of `logit_bias`, and of what ends a request: its stop tokens and the model's own


class SpeculationParams(msgspec.Struct, frozen=True, kw_only=True):
    """What one request asks of speculation."""

    enabled: bool = True
    max_draft_tokens: int | None = None  # of one tree
    acceptance: Literal["exact", "typical"] = "exact"
    epsilon: float = 0.09  # typical acceptance: hard floor of the probability
    delta: float = 0.3  # typical acceptance: factor of exp(-entropy)


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How the tokens of one request are drawn and when it ends. Values are validated by the server.

    `top_k` 0 is off. `logprobs` is the number of alternatives reported beside each committed token (0 for
    the token alone), None for no logprobs. `stop_token_ids` end the request like EOS does; EOS itself is
    the model's and is switched off by `ignore_eos`.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    speculation: SpeculationParams = SpeculationParams()


# server -> engine


class Configure(msgspec.Struct, frozen=True, tag=True):
    """The first message: what to load."""

    config: EngineConfig


class AddRequest(msgspec.Struct, frozen=True, tag=True):
    """`cache_scope`: the request shares cached prefixes with those of the same scope alone."""

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    cache_scope: str = ""


class AbortRequest(msgspec.Struct, frozen=True, tag=True):
    request_id: str


ToEngine = Configure | AddRequest | AbortRequest


# engine -> server


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine serves, as it was resolved at start-up."""

    architecture: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    dtype: str
    device: str
    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    heads: str | None  # name and kind of the head set, for people
    num_heads: int
    max_tree_nodes: int  # root included; 1 where nothing speculates
    # Of the weights: what was asked for, or what auto came to, as int4+int8: the most weights' format first.
    quantization: str = "none"
    backend: str = "torch"  # whose kernels run the layers
    kv_cache_dtype: str | None = None  # where it is not the model's
    largest_pass_seconds: float = 0.0  # estimated, of a pass with all the tokens it may have; 0: not known


class EngineReady(msgspec.Struct, frozen=True, tag=True):
    info: ModelInfo


class EngineFailed(msgspec.Struct, frozen=True, tag=True):
    """The engine could not start; it exits after this."""

    message: str
    eager_may_start: bool = False  # whether another process that captures no CUDA graphs may start


class TokenLogprobs(msgspec.Struct, frozen=True):
    """Log-probability of a committed token in the model's own distribution, and the likeliest others."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]  # (token id, logprob), likeliest first


class RequestUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Totals of one request so far."""

    cached_tokens: int  # prompt tokens found in the prefix cache
    decode_steps: int  # passes that committed tokens
    drafted_tokens: int  # draft tokens that were verified, summed over its steps
    accepted_tokens: int  # draft tokens that were committed


class RequestOutput(msgspec.Struct, frozen=True, kw_only=True):
    """What one step brought one request. The last output of a request has a `finish_reason`.

    `token_ids` include the EOS or stop token that ended it; `stop_token_id` names that token.
    """

    request_id: str
    token_ids: list[int]
    usage: RequestUsage
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    failure: Failure | None = None  # why the engine gave it up


# heads, ngrams: who guessed in the last step. not_worthwhile: drafts would cost more than they bring.
# probing: a step without drafts to tell what they cost. no_guess: no request could have had any.
# fixed: as many drafts as somebody said. off: speculation is switched off.
SpeculationState = Literal["heads", "ngrams", "not_worthwhile", "probing", "no_guess", "fixed", "off"]


class StepStats(msgspec.Struct, frozen=True, kw_only=True):
    """One step in numbers, for /metrics."""

    duration: float  # seconds, schedule to update
    num_tokens: int  # in the forward pass: prompt chunks, roots and draft tokens
    committed_tokens: list[int]  # per request that committed in this step
    drafted_tokens: int
    accepted_by_depth: list[int]  # [d] draft tokens accepted at depth d + 1, over the requests
    drafted_by_depth: list[int]  # [d] requests whose tree reached depth d + 1
    num_running: int
    num_waiting: int
    kv_usage: float  # share of blocks in use by requests, 0 to 1
    preemptions: int
    prefix_queries: int  # prompt tokens looked up in the prefix cache
    prefix_hits: int  # of these, found
    out_of_memory: int = 0  # passes that had no memory and were made again with less in them
    speculation: SpeculationState = "off"
    estimated_speed_up: float = 1.0  # of the step's drafts over none, as planned
    measured_speed_up: float = 1.0  # over the last hundred steps or so


class StepOutput(msgspec.Struct, frozen=True, tag=True):
    outputs: list[RequestOutput]
    stats: StepStats


class RequestRefused(msgspec.Struct, frozen=True, tag=True):
    """The engine does not run this request; `parameter` is the field at fault."""

    request_id: str
    parameter: str
    message: str


ToServer = EngineReady | EngineFailed | StepOutput | RequestRefused
