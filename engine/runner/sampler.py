"""Draws one target at every node of every tree, with the node's own path as its context.

Where nobody asks for more, targets are argmaxes and nothing else happens. What requests ask beyond that,
processors do to their rows (`engine.runner.processors`), and a draw is an argmax with noise
(`engine.backends.noise`). Host-side work is choosing rows; the rest is tensors, so that a CUDA graph may hold
it, for all rows of a pass and everything that may be asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.backends.backend import Backend
from engine.backends.draws import Draws
from engine.backends.noise import Noise
from engine.batch import RequestState, ScheduledRequest
from engine.messages import TokenLogprobs
from engine.runner import sampling
from engine.runner.per_request import PerRequest
from engine.runner.processors import DrawRows, LogitBias, MinimumLength, Penalties, Processor
from engine.runner.sampling_table import Demand, SamplingTable
from engine.runner.step_input import CommitRows, StepInput
from engine.runner.transfer import to_device
from trees.verify import DraftTrees, exact_edges


@dataclass(frozen=True)
class Verdict:
    targets: Tensor  # [num_commits, max_nodes] int64
    edges: Tensor  # [num_commits, max_nodes] bool: the node may follow its parent


class Sampler:
    """num_seats: rows of the runner's per-request state."""

    def __init__(
        self, vocab_size: int, eos_token_ids: tuple[int, ...], num_seats: int, backend: Backend
    ) -> None:
        device = backend.place.device
        self._backend = backend
        self._table = SamplingTable(num_seats, device)
        # In this order.
        self._processors: tuple[Processor, ...] = (
            LogitBias(num_seats, device),
            Penalties(num_seats, vocab_size, device, self._table),
            MinimumLength(num_seats, device, eos_token_ids),
        )
        self._demands: PerRequest[Demand] = PerRequest(self._load)

    def prepare(self, scheduled: Sequence[ScheduledRequest]) -> Demand:
        """Take in what the requests of the coming pass ask for; returns it."""
        demand = Demand.NOTHING
        for s in scheduled:
            asked = self._demands[s.request]
            demand |= asked
            if s.request.seat is not None:
                for processor in self._processors:
                    if processor.demand in asked:
                        processor.catch_up(s.request, s.request.seat)
        return demand

    def _load(self, request: RequestState) -> Demand:
        if request.seat is None:
            raise RuntimeError(f"request {request.request_id} does not run")
        self._table.load(request, request.seat)
        for processor in self._processors:
            processor.load(request, request.seat)
        return Demand.of(request.sampling)

    def noise_ahead(self, seats: Tensor, roots: Tensor, num_levels: int) -> Noise:
        """Noise of the draws that follow each root; see `SamplingTable.noise_ahead`."""
        return self._table.noise_ahead(seats, roots, num_levels)

    def judge(self, logits: Tensor, step: StepInput, trees: DraftTrees, demand: Demand) -> Verdict:
        """Targets of all nodes, and which nodes agree with them.

        logits: [num_nodes_total, vocab]; demand: as `prepare` returns it. A pass without a list of its
        requests, as a graph holds it, gets all that it may ask for done to all rows.
        """
        commits = step.commits
        targets = torch.zeros_like(trees.tokens)
        if not demand:
            targets.view(-1)[commits.places] = self._backend.argmax(logits)
            return Verdict(targets, exact_edges(targets, trees))
        rows = _draw_rows(step, trees)
        for processor in self._processors:
            if processor.demand & demand:
                logits = self._process(processor, logits, rows, commits)
        drawn, typical = self._draw(logits, rows, commits, demand)
        targets.view(-1)[commits.places] = drawn
        edges = exact_edges(targets, trees)
        if typical is not None:
            self._follow_typical(edges, typical, rows, commits, trees)
        return Verdict(targets, edges)

    def _process(self, processor: Processor, logits: Tensor, rows: DrawRows, commits: CommitRows) -> Tensor:
        """Only on the rows of those who ask for it, where the host knows them."""
        asking = self._rows_of(commits, processor.demand)
        if asking is None:
            return processor.apply(logits.float(), rows)
        processed = processor.apply(logits[asking].float(), rows.select(asking))
        return logits.float().index_copy(0, asking, processed)

    def _draw(
        self, logits: Tensor, rows: DrawRows, commits: CommitRows, demand: Demand
    ) -> tuple[Tensor, _Typical | None]:
        """Targets [num_rows] int64, and what typical acceptance has to know."""
        if Demand.DRAW not in demand:
            return self._backend.argmax(logits), None
        if not commits.scheduled:  # in a graph
            drawn, probs = self._backend.draw_with_probs(logits.float(), self._draws(rows), in_graph=True)
            return drawn, _Typical(None, probs)
        typical = self._rows_of(commits, Demand.TYPICAL) if Demand.TYPICAL in demand else _none(rows)
        asking = self._rows_of(commits, Demand.DRAW)
        if asking is None and typical is not None and not len(typical):
            return self._backend.draw(logits.float(), self._draws(rows), Demand.CUTS in demand), None
        drawn = self._backend.argmax(logits)
        exact = self._rows_of(commits, Demand.DRAW, without=Demand.TYPICAL)
        if exact is None or len(exact):
            exact = _all(rows) if exact is None else exact
            draws = self._draws(rows.select(exact))
            drawn[exact] = self._backend.draw(logits[exact].float(), draws, Demand.CUTS in demand)
        typical = _all(rows) if typical is None else typical
        if not len(typical):
            return drawn, None
        # Of these the probabilities are needed too.
        draws = self._draws(rows.select(typical))
        drawn[typical], probs = self._backend.draw_with_probs(logits[typical].float(), draws, in_graph=False)
        return drawn, _Typical(typical, probs)

    def _draws(self, rows: DrawRows) -> Draws:
        table, seats = self._table, rows.seats
        return Draws(
            keys=table.keys(seats, rows.positions),
            temperatures=table.real("temperature", seats).float(),
            top_k=table.top_k(seats),
            top_p=table.real("top_p", seats),
            min_p=table.real("min_p", seats).float(),
        )

    def _rows_of(
        self, commits: CommitRows, demand: Demand, without: Demand = Demand.NOTHING
    ) -> Tensor | None:
        """Rows of the requests that ask for one thing and not for another, [num_asking]; None for all."""
        chosen = [
            np.arange(first, first + s.num_drafts + 1)
            for first, s in zip(commits.offsets, commits.scheduled, strict=True)
            if demand in (asked := self._demands[s.request]) and not asked & without
        ]
        if len(chosen) == len(commits.scheduled):
            return None
        rows = np.concatenate(chosen) if chosen else np.zeros(0, dtype=np.int64)
        return to_device(rows, commits.rows.device)

    def _follow_typical(
        self, edges: Tensor, typical: _Typical, rows: DrawRows, commits: CommitRows, trees: DraftTrees
    ) -> None:
        """Let nodes of those who ask for typical acceptance follow their parents where they may; writes into
        edges, [num_commits, max_nodes] bool."""
        chosen = _all(rows) if typical.rows is None else typical.rows
        places = commits.places[chosen]
        seats = rows.seats[chosen]
        # Where each row's parent lies among the chosen ones: as far from it as in its tree.
        nodes, parents = places % commits.max_nodes, trees.parents.reshape(-1)[places]
        above = torch.arange(len(chosen), device=chosen.device) - nodes + parents
        probs = typical.probs / typical.probs.sum(dim=1, keepdim=True)
        threshold = sampling.typical_threshold(
            probs, self._table.real("epsilon", seats).float(), self._table.real("delta", seats).float()
        )
        follows = probs[above, trees.tokens.reshape(-1)[places]] > threshold[above]
        asked = self._table.real("is_typical", seats) > 0.0
        edges.view(-1)[places] = torch.where(asked, follows, edges.view(-1)[places])


@dataclass(frozen=True)
class _Typical:
    rows: Tensor | None  # [num_rows] int64 of requests that ask for typical acceptance; None for all
    probs: Tensor  # [num_rows, vocab], what they are drawn from; any sum


def _none(rows: DrawRows) -> Tensor:
    return rows.seats.new_zeros(0)


def _all(rows: DrawRows) -> Tensor:
    return torch.arange(len(rows.seats), device=rows.seats.device)


def _draw_rows(step: StepInput, trees: DraftTrees) -> DrawRows:
    commits = step.commits
    owners = commits.places // commits.max_nodes
    depths = trees.depths.reshape(-1)[commits.places]
    paths = trees.paths.flatten(0, 1)[commits.places, 1:]
    return DrawRows(
        seats=commits.seats[owners],
        positions=step.positions[commits.rows] + 1,
        drafted=trees.tokens[owners].gather(1, paths),
        is_drafted=torch.arange(paths.shape[1], device=paths.device) < depths.unsqueeze(1),
    )


def token_logprobs(logits: Tensor, token_ids: Sequence[int], num_top: Sequence[int]) -> list[TokenLogprobs]:
    """Log-probabilities of committed tokens under the model's own, unadjusted distribution, read by the host
    at once.

    logits: [num_tokens, vocab], the rows the tokens were drawn from; num_top: alternatives of each token.
    """
    log_probs = logits.float().log_softmax(dim=1)
    chosen = torch.tensor(token_ids, device=logits.device).unsqueeze(1)
    values, ids = log_probs.topk(max(num_top), dim=1)
    # Token ids below 2**53 are whole numbers in float64, too: one transfer.
    found = torch.cat((log_probs.gather(1, chosen).double(), values.double(), ids.double()), dim=1).tolist()
    most = values.shape[1]
    return [
        TokenLogprobs(
            token_id,
            row[0],
            [
                (int(i), value)
                for i, value in zip(row[1 + most : 1 + most + top], row[1 : 1 + top], strict=True)
            ],
        )
        for token_id, row, top in zip(token_ids, found, num_top, strict=True)
    ]
