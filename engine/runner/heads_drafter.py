"""Drafts with a head set that is bound to its base model."""

from __future__ import annotations

import torch

from engine.runner.drafter import Drafter, DraftInput, Proposal
from heads.medusa import MedusaHeads
from trees.family import TreeFamily


class HeadsDrafter(Drafter):
    def __init__(self, heads: MedusaHeads, family: TreeFamily) -> None:
        self._heads = heads
        self._family = family

    def propose(self, draft: DraftInput) -> Proposal:
        family = self._family.prefix(draft.max_nodes - 1)
        parents, depths, ranks = (torch.tensor(x) for x in (family.parents, family.depths, family.ranks))
        tokens = self._heads.fill_tree(draft.hidden, draft.roots, parents, depths, ranks)
        return Proposal(tokens, parents.to(tokens.device).expand_as(tokens), family.max_depth)
