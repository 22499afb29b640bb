"""Drafts what followed the same words earlier in the request: no model, and long runs where text repeats."""

from __future__ import annotations

import torch

from engine.runner.drafter import Drafter, DraftInput, Proposal, chain_parents
from engine.runner.per_request import PerRequest
from engine.scheduling.ngrams import NgramIndex
from engine.scheduling.request import Request


class NgramDrafter(Drafter):
    """A chain for each request whose last tokens have occurred before, nothing for the others."""

    def __init__(self) -> None:
        self._indices: PerRequest[NgramIndex] = PerRequest(lambda _: NgramIndex())

    def limit(self, request: Request, num_drafts: int) -> int:
        return len(self._guesses(request, num_drafts))

    def propose(self, draft: DraftInput) -> Proposal:
        width = draft.max_nodes - 1
        rows = []
        for request, budget in zip(draft.requests, draft.budgets, strict=True):
            guesses = self._guesses(request, budget - 1)
            rows.append([request.token_ids[-1], *guesses, *[0] * (width - len(guesses))])
        tokens = torch.tensor(rows, device=draft.roots.device)
        return Proposal(tokens, chain_parents(tokens), width)

    def _guesses(self, request: Request, num_drafts: int) -> list[int]:
        index = self._indices[request]
        index.extend(request.token_ids)
        return index.continuation(request.token_ids, num_drafts)
