"""Drafts the n-gram chain of each request and nothing else: for models without heads."""

from __future__ import annotations

import numpy as np

from engine.runner.drafter import Drafter, DraftInput, Proposal, chain_parents
from engine.runner.transfer import to_device
from engine.scheduling.batch import ScheduledRequest


class NgramDrafter(Drafter):
    """A chain for each request whose last tokens have occurred before, nothing for the others."""

    takes_chains = True

    def limit(self, scheduled: ScheduledRequest) -> int:
        return min(scheduled.num_drafts, len(scheduled.chain.token_ids))

    def propose(self, draft: DraftInput) -> Proposal:
        return propose_chains(draft)


def propose_chains(draft: DraftInput) -> Proposal:
    """Every request's chain as its tree."""
    width = draft.max_nodes - 1
    rows = []
    for request, chain in zip(draft.requests, draft.chains, strict=True):
        guesses = chain.token_ids[:width]
        rows.append([request.token_ids[-1], *guesses, *[0] * (width - len(guesses))])
    tokens = to_device(np.array(rows, dtype=np.int64), draft.roots.device)
    return Proposal(tokens, chain_parents(tokens), width)
