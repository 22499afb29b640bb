"""Which prompts a step goes on with, and with how many tokens each. Plain Python; never sees a tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from engine.batch import ScheduledRequest
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.pacing import Pacing
from engine.scheduling.request import Request

_LEAST_TOKENS = 8  # of the oldest prompt, and of the one with the fewest tokens left, whatever they take


class PromptShare:
    """What a step has for prompts: tokens, and seconds."""

    def __init__(self, pacing: Pacing, num_tokens: int, seconds: float) -> None:
        self._pacing, self._num_tokens, self._seconds = pacing, num_tokens, seconds
        self._num_served = 0

    @property
    def is_left(self) -> bool:
        """Whether somebody would get something."""
        return self._num_tokens > 0 and (self._num_served < 2 or self._seconds > 0.0)

    def take(self, num_left: int, context: int, share: float = 1.0) -> int:
        """Tokens for a prompt that has so many left behind so many computed ones, out of a share of what is
        left; at least one where `is_left`."""
        least = _LEAST_TOKENS if self._num_served < 2 else 1
        affordable = max(self._pacing.affordable(share * self._seconds, context), least)
        most = min(num_left, max(math.ceil(share * self._num_tokens), 1))
        num_tokens = most if affordable >= most else int(affordable)
        self._num_served += 1
        self._num_tokens -= num_tokens
        self._seconds -= self._pacing.chunk_seconds(num_tokens, context)
        return num_tokens


def read_prompts(
    prompts: Sequence[Request],
    share: PromptShare,
    pool: BlockPool,
    joins: Callable[[Request], bool],
) -> list[ScheduledRequest]:
    """Give half of what there is to the oldest prompt, so that each is done some day, and the rest to those
    with the fewest tokens left, so that short ones are not held by long ones; first of all to those which had
    to give up their blocks while they were answering.

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
    read(oldest, 0.5)

    def urgency(request: Request) -> tuple[bool, int]:
        done = chunks[request].num_tokens if request in chunks else 0
        return request.num_output_tokens == 0, num_left(request, pool) - done

    for request in sorted(prompts, key=urgency):
        if share.is_left and joins(request):
            read(request, 1.0)
    return list(chunks.values())


def likely_tokens(prompts: Sequence[Request], pacing: Pacing, budget: int, seconds: float) -> int:
    """About how many prompt tokens a step will read."""
    context = max((request.num_computed for request in prompts), default=0)
    affordable = min(budget, pacing.affordable(seconds, context))
    return min(sum(request.num_pending for request in prompts), int(affordable))


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
