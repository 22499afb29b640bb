"""Which prompts a step goes on with, and with how many tokens each. Plain Python; never sees a tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from engine.batch import ScheduledRequest
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.pacing import Pacing
from engine.scheduling.request import Request

_LEAST_TOKENS = 4  # of the oldest prompt, and of the one with the fewest tokens left, whatever they take
_OVERRUN = 1.25  # times the seconds there are, where that finishes a prompt
_FOR_THE_OLDEST = 0.15  # of the time, where there are others
# Tokens of a step that drafts leave to prompts, where these have so many; less of a small budget.
_KEPT_FOR_PROMPTS = 16


class PromptShare:
    """What a step has for prompts, and for drafts beside them: tokens, and seconds.

    num_tokens: that the step may hold besides its roots. num_computed: positions that each of the requests
    which decode has computed.
    """

    def __init__(self, pacing: Pacing, num_tokens: int, num_computed: Sequence[int]) -> None:
        self._pacing, self._num_tokens = pacing, num_tokens
        self._num_beside = len(num_computed)  # tokens that the step holds so far
        self._seconds = pacing.spare_seconds(len(num_computed), sum(num_computed))
        self._usual_context = sum(num_computed) // max(len(num_computed), 1)
        self._num_served = 0

    def likely_tokens(self, prompts: Sequence[Request]) -> int:
        """About how many prompt tokens the step will read where nobody drafts."""
        num_computed = max((request.num_computed for request in prompts), default=0)
        most = min(sum(request.num_pending for request in prompts), self._num_tokens)
        affordable = self._pacing.affordable(self._seconds, num_computed, self._num_beside, most)
        return max(affordable, min(_LEAST_TOKENS, most))

    def most_drafts(self, num_prompt_tokens: int) -> int:
        """Draft tokens that may be made beside so many prompt tokens: they take no more than half of the
        time, and leave some tokens to prompts."""
        if not num_prompt_tokens:
            return self._num_tokens
        most = self._num_tokens - min(num_prompt_tokens, _KEPT_FOR_PROMPTS, -(-self._num_tokens // 2))
        return self._pacing.affordable(self._seconds / 2, self._usual_context, self._num_beside, most)

    def pay_drafts(self, num_drafts: int) -> None:
        """Take off what so many draft tokens cost."""
        self._spend(num_drafts, self._usual_context)

    @property
    def is_left(self) -> bool:
        """Whether some prompt would get something."""
        return self._num_tokens > 0 and (self._num_served < 2 or self._seconds > 0.0)

    def take(self, num_left: int, num_computed: int, share: float = 1.0) -> int:
        """Tokens for a prompt that has so many left behind so many computed ones, out of a share of what is
        left; at least one where `is_left`."""
        most = min(num_left, max(math.ceil(share * self._num_tokens), 1))
        least = min(_LEAST_TOKENS if self._num_served < 2 else 1, most)
        seconds = share * self._seconds
        whole = self._pacing.added_seconds(num_left, num_computed, self._num_beside)
        if most == num_left and whole <= _OVERRUN * seconds:
            num_tokens = num_left
        else:
            num_tokens = max(self._pacing.affordable(seconds, num_computed, self._num_beside, most), least)
        self._num_served += 1
        self._spend(num_tokens, num_computed)
        return num_tokens

    def _spend(self, num_tokens: int, num_computed: int) -> None:
        self._seconds -= self._pacing.added_seconds(num_tokens, num_computed, self._num_beside)
        self._num_tokens -= num_tokens
        self._num_beside += num_tokens


def read_prompts(
    prompts: Sequence[Request],
    share: PromptShare,
    pool: BlockPool,
    joins: Callable[[Request], bool],
) -> list[ScheduledRequest]:
    """Give a part of what there is to the oldest prompt, so that each is done some day. The rest goes to
    those with the fewest tokens left, so that short ones are not held by long ones. First come those which
    had to give up their blocks while they were answering.

    prompts: oldest first; joins: whether one of them takes part, asked only when it would get something.
    """
    chunks: dict[Request, ScheduledRequest] = {}

    def read(request: Request, part: float) -> None:
        chunk = chunks.setdefault(request, ScheduledRequest(request, 0))
        left = request.num_pending - chunk.num_tokens
        if left:
            chunk.num_tokens += share.take(left, chunk.num_computed + chunk.num_tokens, part)

    oldest = next((request for request in prompts if share.is_left and joins(request)), None)
    if oldest is None:
        return []
    if len(prompts) == 1:
        read(oldest, 1.0)
        return list(chunks.values())
    read(oldest, _FOR_THE_OLDEST)

    def urgency(request: Request) -> tuple[bool, int]:
        done = chunks[request].num_tokens if request in chunks else 0
        return request.num_output_tokens == 0, num_left(request, pool) - done

    for request in sorted(prompts, key=urgency):
        if share.is_left and joins(request):
            read(request, 1.0)
    return list(chunks.values())


def reusable_hashes(request: Request, pool: BlockPool) -> Sequence[bytes]:
    """Names of the blocks that a waiting request may find in the pool. Its root is always computed anew: what
    comes first is drawn from the root's pass."""
    request.extend_hashes(pool.block_size)
    return request.block_hashes[: (len(request.token_ids) - 1) // pool.block_size]


def num_left(request: Request, pool: BlockPool) -> int:
    """Tokens of a running or waiting prompt that are to be read."""
    found = 0 if request.seat is not None else pool.prefix_length(reusable_hashes(request, pool))
    return request.num_pending - found * pool.block_size


def is_being_read(request: Request, running: Iterable[Request], pool: BlockPool) -> bool:
    """Whether the block that a waiting request would begin with is about to be computed for another."""
    hashes = reusable_hashes(request, pool)
    block = pool.prefix_length(hashes)
    return block < len(hashes) and any(
        not other.has_hidden and other.block_hashes[block : block + 1] == [hashes[block]] for other in running
    )
