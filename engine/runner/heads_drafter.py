"""Drafts with a head set that is bound to its base model.

The heads fill more of the family than is asked for, and every request keeps the nodes that are likeliest in
its own case.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.runner.drafter import Drafter, DraftInput, Proposal
from heads.medusa import MedusaHeads
from trees.family import TreeFamily
from trees.select import likeliest_nodes

_ENVELOPE_FACTOR, _SMALLEST_ENVELOPE = 4, 16  # draft nodes to choose from, for each one asked for


@dataclass(frozen=True)
class _Envelope:
    """The first nodes of the family, all [num_nodes] int64, the root first."""

    parents: Tensor
    depths: Tensor
    ranks: Tensor
    device_parents: Tensor  # the parents again, where the heads are
    max_depth: int


class HeadsDrafter(Drafter):
    """`static` takes the family's own order instead, the same nodes for everybody: to compare with."""

    def __init__(self, heads: MedusaHeads, family: TreeFamily, *, static: bool = False) -> None:
        self._heads = heads
        self._family = family
        self._static = static
        self._envelopes: dict[int, _Envelope] = {}

    def propose(self, draft: DraftInput) -> Proposal:
        num_drafts = draft.max_nodes - 1
        offered = num_drafts if self._static else max(_ENVELOPE_FACTOR * num_drafts, _SMALLEST_ENVELOPE)
        envelope = self._envelope(min(offered, len(self._family.paths)), draft.roots.device)
        tokens, log_probs = self._heads.fill_tree(
            draft.hidden, draft.roots, envelope.parents, envelope.depths, envelope.ranks
        )
        parents, max_depth = envelope.device_parents, envelope.max_depth
        if self._static:
            return Proposal(tokens, parents.expand_as(tokens), max_depth)
        nodes, kept_parents = likeliest_nodes(log_probs, parents, max_depth, draft.num_nodes, draft.max_nodes)
        return Proposal(tokens.gather(1, nodes), kept_parents, max_depth)

    def _envelope(self, num_drafts: int, device: torch.device) -> _Envelope:
        if num_drafts not in self._envelopes:
            family = self._family.prefix(num_drafts)
            parents = torch.tensor(family.parents)
            self._envelopes[num_drafts] = _Envelope(
                parents=parents,
                depths=torch.tensor(family.depths),
                ranks=torch.tensor(family.ranks),
                device_parents=parents.to(device),
                max_depth=family.max_depth,
            )
        return self._envelopes[num_drafts]
