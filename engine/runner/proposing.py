"""What a pass asks of its drafter, and the trees that come of the answer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from engine.batch import Batch
from engine.runner.drafter import Drafter, Proposal, RootRows
from engine.runner.layout import build_rows
from engine.runner.sampling_table import Demand
from engine.runner.transfer import integers, to_device
from engine.runner.work import Work
from trees.select import make_chains


def limit_drafts(drafter: Drafter, batch: Batch) -> None:
    """Leave out draft tokens that there are no guesses for, and what was expected of them. Guesses that turn
    out to be too unlikely come later: of them it was expected that some are wrong."""
    for scheduled in batch.scheduled:
        if scheduled.num_drafts:
            scheduled.grant(drafter.limit(scheduled))


def levels_of(drafter: Drafter, batch: Batch) -> int:
    """How many levels of guesses a batch asks for that take time of their own."""
    drafting = [s for s in batch.scheduled if s.num_drafts]
    if not any(s.asks_heads for s in drafting):
        return 0
    return min(drafter.num_levels, max(s.num_drafts for s in drafting))


def propose(work: Work, batch: Batch, demand: Demand) -> Proposal | None:
    """Guesses for the requests of a batch that have drafts, None where nobody has; lowers the number of those
    that get fewer."""
    drafter, backend, cache, hidden = work.drafter, work.backend, work.cache, work.hidden.rows
    drafting = [s for s in batch.scheduled if s.num_drafts]
    if not drafting:
        return None
    requests, budgets = [s.request for s in drafting], [s.num_drafts + 1 for s in drafting]
    roots_at = [len(request.token_ids) - 1 for request in requests]
    device, max_nodes, levels = hidden.device, max(budgets), levels_of(drafter, batch)
    seats = integers([s.request.seat or 0 for s in drafting], device)
    positions = integers(roots_at, device)
    attention = noise = least = None
    if levels and drafter.root_heads is not None:
        # The pass over the roots alone.
        roots = build_rows(requests, roots_at, [root + 1 for root in roots_at], cache.block_size, device)
        attention = backend.attention(roots, cache, drafter.root_heads)
    guessed = levels if drafter.takes_chains else max_nodes - 1
    if guessed and Demand.DRAW in demand:
        noise = work.sampler.noise_ahead(seats, positions, guessed)
    if drafter.trims and backend.host_is_device:  # elsewhere the host would wait for what was drafted
        least = to_device(np.array([s.allowance.least for s in drafting], dtype=np.float32), device).log_()
    proposal = drafter.grow(
        RootRows(
            hidden=hidden[seats],
            roots=integers([request.token_ids[-1] for request in requests], device),
            positions=positions,
            num_nodes=integers(budgets, device),
            max_nodes=max_nodes,
            levels=levels,
            chains=make_chains([(s.chain.token_ids, s.chain.gains) for s in drafting], max_nodes - 1, device),
            noise=noise,
            attention=attention,
            least=least,
            requests=requests,
        )
    )
    if proposal.num_nodes is not None:
        grown = proposal.num_nodes.tolist()
        for scheduled, num_nodes in zip(drafting, grown, strict=True):
            scheduled.num_drafts = num_nodes - 1
        kept = [index for index, num_nodes in enumerate(grown) if num_nodes > 1]
        if len(kept) < len(drafting):
            proposal = replace(proposal, tokens=proposal.tokens[kept], parents=proposal.parents[kept])
    return proposal
