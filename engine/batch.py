"""What one pass takes and brings back, as plain data: the scheduler writes a batch, the runner reads it and
returns results. The two sides of a step share this module and nothing else.

Glossary, one meaning each, used throughout the engine:

block table       the KV blocks of a request; logical position p lives in block_table[p // block_size]
slot              a physical place of the KV cache, which holds the K and V of one token
slot mapping      the slot of every token of a pass
seat              a row of the runner's per-request state; a running request has one
prefix length     how many committed positions a query token sees
root              the last known token of a request; its KV is not computed yet
draft tokens      guesses that hang below the root in a tree; limits on drafts do not count the root
node              a token of a tree; node 0 is the root, and numbers of nodes count it
target            the token the model itself draws at a node
accepted tokens   draft tokens on the path that agrees with the targets
bonus token       the target at the end of that path; it needs no draft
committed tokens  accepted tokens and the bonus token: what the request gains in a step
tokens per step   committed tokens of one request in one step
compaction        moving the accepted nodes' K and V to the positions they have now earned
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from engine.messages import SamplingParams, SpeculationState, TokenLogprobs


def make_block_table(blocks: Iterable[int] = ()) -> array[int]:
    """64-bit integers side by side, which our own kernels read where they lie."""
    return array("q", blocks)


@dataclass(frozen=True)
class BatchLimits:
    """How much a batch may hold."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int  # positions of one request
    max_drafts: int  # draft tokens of one request


@dataclass(slots=True, eq=False, weakref_slot=True)
class RequestState:
    """
    A request as a pass sees it. The lists are the scheduler's own: they grow between passes.

    token_ids    known tokens   |---- prompt ----|---- output ----|
    num_computed                |---- KV is final ----|
    pending tokens                                    |-----------|  at least one while it lives

    The last known token is the *root*: the step that computes it also commits what comes after it.
    """

    request_id: str
    token_ids: list[int]
    num_prompt_tokens: int
    sampling: SamplingParams
    seed: int  # of its draws, its own or the engine's
    num_computed: int = 0
    block_table: array[int] = field(default_factory=make_block_table)
    seat: int | None = None  # None while it waits

    @property
    def num_pending(self) -> int:
        return len(self.token_ids) - self.num_computed


@dataclass(frozen=True, slots=True)
class Chain:
    """Guesses at the next tokens, one after the other; `gains[i]` is the estimated probability that all of
    the first i + 1 are right."""

    token_ids: Sequence[int] = ()
    gains: Sequence[float] = ()
    match: int = 0  # tokens before the first that agree with those before the earlier place


NO_CHAIN = Chain()


@dataclass(frozen=True, slots=True)
class Allowance:
    """What a request may draft in a step: at most `most` tokens, none that is less likely than `least`.

    gains: what each of the draft tokens is to commit by calibration, the likeliest first. They may be fewer
    than `most`, which leaves room for guesses that turn out to be surer than usual.
    chain_only: its n-gram chain makes all of them, and the heads are not asked.
    """

    most: int = 0
    least: float = 0.0
    gains: Sequence[float] = ()
    chain_only: bool = False

    @property
    def expected(self) -> float:
        """Draft tokens it is to commit by calibration, the measure of what it will commit."""
        return sum(self.gains)

    def granted(self, size: int) -> Allowance:
        """What is left of it where there is room, or there are guesses, for `size` draft tokens."""
        if size >= self.most:
            return self
        return replace(self, most=size, gains=self.gains[:size]) if size > 0 else NOTHING


NOTHING = Allowance()


@dataclass(slots=True)
class ScheduledRequest:
    """One request's share of a pass: `num_tokens` known tokens, then `num_drafts` tree nodes.

    Drafts are only given to a request whose known tokens end in this pass.
    """

    request: RequestState
    num_tokens: int
    num_drafts: int = 0
    chain: Chain = NO_CHAIN  # what followed its last tokens before, for the drafter to weigh
    most_gained: int = 0  # tokens that a pass still under way may bring before this one
    allowance: Allowance = NOTHING  # what it may draft; `num_drafts` is what it does
    num_computed: int = field(init=False)  # positions its request had computed before the pass
    num_committed: int = 0  # what the step brought, once it is known
    num_accepted: int = 0
    draft_depth: int = 0  # how deep its tree reached

    def __post_init__(self) -> None:
        self.num_computed = self.request.num_computed

    @property
    def asks_heads(self) -> bool:
        """Whether the heads guess for it."""
        return self.allowance.most > 0 and not self.allowance.chain_only

    @property
    def commits(self) -> bool:
        """Whether the pass reaches the root, so that the request gains tokens. Holds until the update."""
        return self.num_tokens == self.request.num_pending

    def grant(self, size: int) -> None:
        """Let it draft no more than this of what it may."""
        self.num_drafts, self.allowance = min(self.num_drafts, size), self.allowance.granted(size)


@dataclass(frozen=True, slots=True)
class SpeculationReport:
    """What speculation does, for people. Speed-ups are over decoding without drafts: `estimated` for the last
    step, before it was made, `measured` over the last hundred or so, against what such steps cost."""

    state: SpeculationState
    estimated: float = 1.0
    measured: float = 1.0


@dataclass(slots=True)
class Batch:
    """The requests of one pass, and what the scheduler did to put them together."""

    scheduled: list[ScheduledRequest] = field(default_factory=list)
    num_preemptions: int = 0
    num_out_of_memory: int = 0  # attempts at its pass that memory was short for
    prefix_queries: int = 0
    prefix_hits: int = 0
    speculation: SpeculationReport = SpeculationReport("off")  # what was decided of it for this batch

    @property
    def num_tokens(self) -> int:
        return sum(s.num_tokens + s.num_drafts for s in self.scheduled)


@dataclass(slots=True)
class PassResult:
    """What a pass brought one request.

    token_ids: accepted tokens, then the bonus token; empty where the pass has not reached the root.
    logprobs: one entry for each of these tokens, where the request asked for them.
    prompt_logprobs: one entry for each known token of the pass that has one before it, in order; None where
        nobody asked. A prompt that is read in chunks gets them chunk by chunk.
    pooled: [hidden_size] float32, one row for the whole prompt, with the pass that ends it; None where nobody
        asked.
    """

    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    draft_depth: int = 0  # how deep the request's tree reached
    prompt_logprobs: list[TokenLogprobs] | None = None
    pooled: NDArray[np.float32] | None = None
