"""What one step computes, as plain data: the scheduler writes it, the runner reads it, results come back.

Glossary, one meaning each, used throughout the engine:

block table       the KV blocks of a request; logical position p lives in block_table[p // block_size]
slot mapping      for every token of a pass, the physical place its K and V are written to
prefix length     how many committed positions a query token sees
root              the last known token of a request; its KV is not computed yet
draft tokens      guesses that hang below the root in a tree; node 0 of the tree is the root
target            the token the model itself draws at a node
accepted tokens   draft tokens on the path that agrees with the targets
bonus token       the target at the end of that path; it needs no draft
committed tokens  accepted tokens and the bonus token: what the request gains in a step
tokens per step   committed tokens of one request in one step
compaction        moving the accepted nodes' K and V to the positions they have now earned
"""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.messages import TokenLogprobs
from engine.scheduling.drafting import NOTHING, Allowance, SpeculationReport, StepCost
from engine.scheduling.ngrams import NO_CHAIN, Chain
from engine.scheduling.request import Request


@dataclass(slots=True)
class ScheduledRequest:
    """One request's share of a pass: `num_tokens` known tokens, then `num_drafts` tree nodes.

    Drafts are only given to a request whose known tokens end in this pass.
    """

    request: Request
    num_tokens: int
    num_drafts: int = 0
    chain: Chain = NO_CHAIN  # what followed its last tokens before, for the drafter to weigh
    base: int = 0  # positions its request had computed before the pass
    most_gained: int = 0  # tokens that a pass still under way may bring before this one
    allowance: Allowance = NOTHING  # what it may draft; `num_drafts` is what it does
    num_committed: int = 0  # what the step brought, once it is known
    num_accepted: int = 0
    draft_depth: int = 0  # how deep its tree reached

    @property
    def guesses(self) -> bool:
        """Whether the heads are asked for it."""
        return self.allowance.most > 0 and not self.allowance.chain_only

    @property
    def commits(self) -> bool:
        """Whether the pass reaches the root, so that the request gains tokens. Holds until the update."""
        return self.num_tokens == self.request.num_pending

    def grant(self, size: int) -> None:
        """Let it draft no more than this of what it may."""
        self.num_drafts, self.allowance = min(self.num_drafts, size), self.allowance.granted(size)


@dataclass(slots=True)
class Batch:
    scheduled: list[ScheduledRequest] = field(default_factory=list)
    num_preemptions: int = 0
    num_out_of_memory: int = 0  # attempts at its pass that memory was short for
    prefix_queries: int = 0
    prefix_hits: int = 0
    speculation: SpeculationReport = SpeculationReport("off")  # what was decided of it for this batch

    @property
    def num_tokens(self) -> int:
        return sum(s.num_tokens + s.num_drafts for s in self.scheduled)

    def cost(self, seconds: float) -> StepCost:
        """What it was made of, once it has taken so long."""
        depths = [s.allowance.most for s in self.scheduled if s.guesses]
        return StepCost(
            num_known=len(self.scheduled),
            num_keys=sum(s.base for s in self.scheduled),
            num_committed=sum(s.num_committed for s in self.scheduled),
            num_drafts=sum(s.num_drafts for s in self.scheduled),
            draft_keys=sum(s.base * s.num_drafts for s in self.scheduled),
            num_guessing=len(depths),
            depth=max(depths, default=0),
            seconds=seconds,
            probing=self.speculation.state == "probing",
        )


@dataclass(slots=True)
class CommittedTokens:
    """What a pass brought one request: accepted tokens, then the bonus token; empty if it has not reached
    its root. `logprobs` has one entry per token where the request asked for them."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    draft_depth: int = 0  # how deep the request's tree reached
