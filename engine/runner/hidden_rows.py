"""What the runner keeps of its requests from pass to pass: a hidden row for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.batch import PassResult, ScheduledRequest
from engine.runner.per_request import PerRequest
from engine.runner.step_input import StepInput
from engine.runner.transfer import integers


@dataclass
class _Behind:
    """`length`: how many positions a request had computed when its hidden row was kept."""

    length: int = 0


class HiddenRows:
    """One row for each seat, [num_seats, hidden]: of a request that decodes, the row that its root was drawn
    from; of a prompt, that of the last token computed. like: a tensor of the model's number format and
    device."""

    def __init__(self, max_num_seqs: int, row_size: int, like: Tensor) -> None:
        # Two more seats: what padding writes, and zeros.
        self.spare_seat, self._zero_seat = max_num_seqs, max_num_seqs + 1
        self.num_seats = max_num_seqs + 2
        self.rows = like.new_zeros(self.num_seats, row_size)
        self._behind: PerRequest[_Behind] = PerRequest(lambda _: _Behind())

    def before(self, scheduled: Sequence[ScheduledRequest]) -> list[int]:
        """The seats that hold the rows before each request's first token in a pass; zeros lie in the seat of
        one whose row is not known."""
        seats = []
        for s in scheduled:
            request = s.request
            known = request.num_computed and self._behind[request].length == request.num_computed
            seats.append(request.seat if known and request.seat is not None else self._zero_seat)
        return seats

    def keep(
        self, step: StepInput, hidden: Tensor, ends: Tensor | None, results: Sequence[PassResult]
    ) -> None:
        """Keep the rows that next drafts start from, and the last row of every prompt chunk that another one
        follows, all by one operator, the last of a pass: one that fails before is repeated from the same
        rows. (A pass that settles by a graph has replaced them by then: its guesses may be worse.)

        hidden: [num_tokens, hidden]; ends: [num_commits, hidden], the rows of the last committed nodes, None
        where a graph has kept them.
        """
        chunks = [
            (s.request, int(end) - 1)
            for s, end in zip(step.scheduled, step.starts[1:], strict=True)
            if not s.commits
        ]
        seats, rows = step.commits.seats, ends
        if chunks:
            rows = hidden.index_select(0, integers([end for _, end in chunks], hidden.device))
            chunk_seats = integers([request.seat or 0 for request, _ in chunks], hidden.device)
            seats = chunk_seats if ends is None else torch.cat((seats, chunk_seats))
            rows = rows if ends is None else torch.cat((ends, rows))
        if rows is not None:
            self.rows[seats] = rows
        for s, result in zip(step.scheduled, results, strict=True):
            length = s.request.num_computed + s.num_tokens
            self._behind[s.request].length = length + max(len(result.token_ids) - 1, 0)
