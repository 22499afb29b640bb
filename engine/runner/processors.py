"""What requests may have done to the logits that their targets are drawn from, each thing for itself.

A processor keeps what requests ask of it in rows of per-request state, and applies it to many rows of logits
at once, by arithmetic on tensors of fixed shapes: no row waits for another, and a CUDA graph may hold it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.batch import RequestState
from engine.messages import MAX_LISTED_TOKENS
from engine.runner import sampling
from engine.runner.sampling_table import Demand, SamplingTable
from engine.runner.transfer import integers, to_device


@dataclass(frozen=True)
class DrawRows:
    """The rows of a pass that targets are drawn from: one for every root and every draft node."""

    seats: Tensor  # [num_rows] int64: where the state of each row's request is kept
    positions: Tensor  # [num_rows] int64, of the token that is drawn
    drafted: Tensor  # [num_rows, depth] int64: draft tokens on the way from the root to the row's node
    is_drafted: Tensor  # [num_rows, depth] bool: which of them there are

    def select(self, rows: Tensor) -> DrawRows:
        """Some of them. rows: [num_selected] int64"""
        return DrawRows(self.seats[rows], self.positions[rows], self.drafted[rows], self.is_drafted[rows])


class Processor(ABC):
    """One thing that is done to logits. `demand`: which requests ask for it."""

    demand: Demand

    @abstractmethod
    def load(self, request: RequestState, seat: int) -> None:
        """Take in what a request asks for, which has not been seen in this row of state before."""

    def catch_up(self, request: RequestState, seat: int) -> None:
        """Take in what a request has committed since. Called before each of its passes."""
        return

    @abstractmethod
    def apply(self, logits: Tensor, rows: DrawRows) -> Tensor:
        """logits: [num_rows, vocab] float32, which stay as they are. Rows of requests that do not ask for it
        come out as they went in."""


class LogitBias(Processor):
    """Adds to the logits of listed tokens."""

    demand = Demand.BIAS

    def __init__(self, num_seats: int, device: torch.device) -> None:
        self._added = _Listed(num_seats, device)

    def load(self, request: RequestState, seat: int) -> None:
        bias = request.sampling.logit_bias
        self._added.set(seat, list(bias), list(bias.values()))

    def apply(self, logits: Tensor, rows: DrawRows) -> Tensor:
        return self._added.add(logits, rows.seats)


class MinimumLength(Processor):
    """Forbids what would end a request before it is long enough."""

    demand = Demand.MIN_TOKENS

    def __init__(self, num_seats: int, device: torch.device, eos_token_ids: tuple[int, ...]) -> None:
        self._forbidden = _Listed(num_seats, device)
        self._eos_token_ids = eos_token_ids
        self._until = torch.zeros(
            num_seats, dtype=torch.int64, device=device
        )  # the first position that may end

    def load(self, request: RequestState, seat: int) -> None:
        params = request.sampling
        ends = (
            list(dict.fromkeys((*self._eos_token_ids, *params.stop_token_ids))) if params.min_tokens else []
        )
        self._forbidden.set(seat, ends, [float("-inf")] * len(ends))
        self._until[seat] = request.num_prompt_tokens + params.min_tokens

    def apply(self, logits: Tensor, rows: DrawRows) -> Tensor:
        early = rows.positions < self._until[rows.seats]
        return torch.where(early.unsqueeze(1), self._forbidden.add(logits, rows.seats), logits)


class Penalties(Processor):
    """Frequency, presence and repetition penalties, of committed tokens and of the drafts on a node's way."""

    demand = Demand.PENALTIES

    def __init__(self, num_seats: int, vocab_size: int, device: torch.device, table: SamplingTable) -> None:
        self._table = table
        # Of each request's output, and whether a token is in its prompt.
        self._counts = _zeros(num_seats, vocab_size, np.dtype(np.int32), device)
        self._in_prompt = _zeros(num_seats, vocab_size, np.dtype(np.bool_), device)
        self._counted: dict[int, int] = {}  # known tokens by row of state

    def load(self, request: RequestState, seat: int) -> None:
        self._counted.pop(seat, None)
        if Demand.PENALTIES not in Demand.of(request.sampling):
            return
        self._counts[seat], self._in_prompt[seat] = 0, False
        prompt = integers(request.token_ids[: request.num_prompt_tokens], self._counts.device)
        self._in_prompt[seat].index_fill_(0, prompt, True)
        self._counted[seat] = request.num_prompt_tokens

    def catch_up(self, request: RequestState, seat: int) -> None:
        counted = self._counted.get(seat)
        if counted is None or counted == len(request.token_ids):
            return
        new = integers(request.token_ids[counted:], self._counts.device)
        self._counts[seat].index_add_(0, new, torch.ones_like(new, dtype=torch.int32))
        self._counted[seat] = len(request.token_ids)

    def apply(self, logits: Tensor, rows: DrawRows) -> Tensor:
        counts = self._counts[rows.seats].float()
        counts.scatter_add_(1, rows.drafted, rows.is_drafted.float())
        penalties = (
            self._table.real(name, rows.seats).float().unsqueeze(1)
            for name in ("repetition", "frequency", "presence")
        )
        return sampling.apply_penalties(
            logits, counts, self._in_prompt[rows.seats] | (counts > 0), *penalties
        )


class _Listed:
    """Numbers to add to some tokens' logits, a list for each request."""

    def __init__(self, num_seats: int, device: torch.device) -> None:
        # Past a list's end nothing is added to token 0.
        self._tokens = torch.zeros(num_seats, MAX_LISTED_TOKENS, dtype=torch.int64, device=device)
        self._values = torch.zeros(num_seats, MAX_LISTED_TOKENS, device=device)
        self._lengths: dict[int, int] = {}  # of lists that are not empty, by row of state

    def set(self, seat: int, tokens: list[int], values: list[float]) -> None:
        if not tokens and seat not in self._lengths:
            return
        device = self._tokens.device
        self._tokens[seat], self._values[seat] = 0, 0.0
        self._tokens[seat, : len(tokens)] = integers(tokens, device)
        self._values[seat, : len(tokens)] = to_device(np.array(values, dtype=np.float32), device)
        self._lengths[seat] = len(tokens)
        if not tokens:
            del self._lengths[seat]

    def add(self, logits: Tensor, seats: Tensor) -> Tensor:
        """logits: [num_rows, vocab] float32; seats: [num_rows] int64"""
        longest = MAX_LISTED_TOKENS if logits.is_cuda else max(self._lengths.values(), default=0)
        return logits.scatter_add(1, self._tokens[seats, :longest], self._values[seats, :longest])


def _zeros(rows: int, columns: int, dtype: np.dtype[np.generic], device: torch.device) -> Tensor:
    """[rows, columns]"""
    return torch.from_numpy(np.zeros((rows, columns), dtype=dtype)).to(device)
