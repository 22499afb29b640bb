"""What a pass asks of its drafter, and the trees that come of the answer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from engine.runner.drafter import Drafter, DraftInput, Proposal
from engine.runner.step_input import CommitRows
from engine.runner.transfer import together
from engine.scheduling.batch import Batch
from trees.verify import DraftTrees


def limit_drafts(drafter: Drafter | None, batch: Batch) -> None:
    """Leave out draft tokens that there are no guesses for, and what was expected of them. Guesses that turn
    out to be too unlikely come later: of them it was expected that some are wrong."""
    if drafter is not None:
        for scheduled in batch.scheduled:
            if scheduled.num_drafts:
                scheduled.grant(drafter.limit(scheduled))


def levels_of(drafter: Drafter | None, batch: Batch) -> int:
    """How many levels of guesses a batch asks of heads that a graph may hold. None where one of its requests
    samples: a graph knows no noise, and all are guessed for without."""
    if drafter is None or not drafter.can_grow():
        return 0
    drafting = [s for s in batch.scheduled if s.num_drafts]
    samples = any(s.request.sampling.temperature > 0.0 for s in drafting)
    if samples or not any(s.guesses for s in drafting):
        return 0
    return min(drafter.num_levels, max(s.num_drafts for s in drafting))


def propose(drafter: Drafter | None, batch: Batch, hidden: Tensor) -> Proposal | None:
    """Guesses for the requests of a batch that have drafts, None where nobody has; lowers the number of those
    that get fewer. hidden: [num_slots, hidden], the rows that roots were drawn from."""
    drafting = [s for s in batch.scheduled if s.num_drafts]
    if not drafting or drafter is None:
        return None
    requests = [scheduled.request for scheduled in drafting]
    known = {
        "slots": np.array([request.slot for request in requests], dtype=np.int64),
        "roots": np.array([request.token_ids[-1] for request in requests], dtype=np.int64),
    }
    known_there = together(known, hidden.device)
    draft = DraftInput(
        requests=requests,
        chains=[scheduled.chain for scheduled in drafting],
        budgets=[scheduled.num_drafts + 1 for scheduled in drafting],
        least=[scheduled.allowance.least for scheduled in drafting],
        chain_only=not any(scheduled.guesses for scheduled in drafting),
        hidden=hidden[known_there["slots"]],
        roots=known_there["roots"],
    )
    proposal = drafter.propose(draft)
    if proposal.num_nodes is not None:
        for scheduled, num_nodes in zip(drafting, proposal.num_nodes, strict=True):
            scheduled.num_drafts = num_nodes - 1
        grown = [index for index, num_nodes in enumerate(proposal.num_nodes) if num_nodes > 1]
        if len(grown) < len(drafting):
            proposal = replace(proposal, tokens=proposal.tokens[grown], parents=proposal.parents[grown])
    return proposal


def make_trees(commits: CommitRows, proposal: Proposal | None) -> DraftTrees:
    """Trees of all that commit, [num_commits, max_nodes]: of most, or of many, the root alone."""
    tokens = torch.nn.functional.pad(commits.roots.unsqueeze(1), (0, commits.max_nodes - 1))
    parents, max_depth = torch.zeros_like(tokens), 0
    if len(commits.drafting) and proposal is None:  # only when costs are measured: all guess token 0
        max_depth = 1
    elif proposal is not None:
        all_draft = len(commits.drafting) == len(commits.scheduled)
        members = slice(None) if all_draft else commits.drafting
        # The roots are known, whatever a drafter makes of them.
        inner = slice(1, commits.max_nodes)
        tokens[members, 1:] = proposal.tokens[:, inner]
        parents[members, 1:] = proposal.parents[:, inner]
        max_depth = proposal.max_depth
    return DraftTrees.build(tokens, parents, commits.num_nodes, max_depth)
