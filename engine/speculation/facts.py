"""What speculation is decided by, as plain data. What is decided lies in `engine.batch`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.batch import Batch
from engine.speculation.acceptance import Acceptance


@dataclass(slots=True)
class Candidate:
    """A request that could take up to `limit` draft tokens in this step.

    chain: probabilities that the guesses of an n-gram chain are right, each with all before it.
    """

    acceptance: Acceptance
    limit: int
    chain: Sequence[float] = ()
    context: int = 0  # positions it has computed


@dataclass(frozen=True, slots=True)
class Load:
    """A pass as it is before drafts: requests that commit in it, known tokens of all its requests, and
    positions that those which commit have computed. budget: draft tokens that it has room for, all requests
    together; None where there is no such limit.
    """

    num_committing: int
    num_tokens: int
    num_keys: int = 0
    budget: int | None = None


@dataclass(frozen=True, slots=True)
class Drafts:
    """Draft tokens of a pass as far as their price goes; the entries belong together, one for each plan."""

    num_drafts: NDArray[np.int64]
    keys: NDArray[np.int64]  # computed positions of each draft token's request, summed up
    num_guessing: NDArray[np.int64]  # requests that heads guess for
    depth: NDArray[np.int64]  # levels that heads are asked for, at least 1


@dataclass(frozen=True, slots=True)
class StepCost:
    """What a step without prompt chunks was made of, and how long it took."""

    num_known: int  # requests, each with its root
    num_keys: int  # positions that they have computed
    num_committed: int  # tokens
    num_drafts: int
    draft_keys: int  # those of each draft token's request, summed up
    num_guessing: int  # requests that heads guessed for
    depth: int  # levels that heads were asked for, 0 where they were not
    seconds: float
    probing: bool = False  # whether it went without drafts to learn what they cost

    @property
    def drafts(self) -> Drafts:
        counts = (self.num_drafts, self.draft_keys, self.num_guessing, max(self.depth, 1))
        return Drafts(*(np.array([count]) for count in counts))


def step_cost(batch: Batch, seconds: float) -> StepCost:
    """What a batch was made of, once it is known how long it took."""
    depths = [s.allowance.most for s in batch.scheduled if s.asks_heads]
    return StepCost(
        num_known=len(batch.scheduled),
        num_keys=sum(s.num_computed for s in batch.scheduled),
        num_committed=sum(s.num_committed for s in batch.scheduled),
        num_drafts=sum(s.num_drafts for s in batch.scheduled),
        draft_keys=sum(s.num_computed * s.num_drafts for s in batch.scheduled),
        num_guessing=len(depths),
        depth=max(depths, default=0),
        seconds=seconds,
        probing=batch.speculation.state == "probing",
    )
