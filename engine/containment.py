"""Runs a batch whatever happens in it. Where memory runs out, the requests that came last wait. After any
other error only the request that causes it is lost.

A failed pass has written only at positions that are not computed yet. So it may be repeated with fewer
requests, or with less of each, as often as needed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto

import torch

from engine.batch import NO_CHAIN, NOTHING, Batch, PassResult, ScheduledRequest
from engine.errors import EngineBrokenError
from engine.messages import Failure, RequestOutput
from engine.runner.device import is_out_of_memory
from engine.scheduling.scheduler import Scheduler

logger = logging.getLogger(__name__)

Execute = Callable[[Batch], list[PassResult]]

_MAX_LOST_STEPS = 3  # after so many steps in a row that failed for all their requests, the engine is at fault


class _Failed(Enum):
    OUT_OF_MEMORY = auto()
    OTHERWISE = auto()


@dataclass
class Passed:
    """The result of a batch. `committed[i]` belongs to `batch.scheduled[i]`, which those that did not run
    have left; `failed` are the last outputs of those that are lost."""

    committed: list[PassResult]
    failed: list[RequestOutput] = field(default_factory=list)
    undisturbed: bool = False  # at the first attempt, so that the time it took is what it costs


class Containment:
    """Executes batches of one scheduler's requests."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._num_lost_steps = 0

    def execute(self, run: Execute, batch: Batch) -> Passed:
        """Run a batch. Where memory is short, the request that came last is preempted until the rest runs;
        one that is alone makes do with less of itself. A pass that raises anything else is repeated request
        by request.

        Requests that did not run leave the batch: they wait, or have failed with "abort".
        Raises EngineBrokenError where several steps have failed for all their requests, memory aside.
        """
        attempts = 0
        while len(batch.scheduled) > 1:
            attempts += 1
            outcome = _attempt(run, batch)
            if isinstance(outcome, list):
                self._num_lost_steps = 0
                return Passed(outcome, undisturbed=attempts == 1)
            if outcome is _Failed.OTHERWISE:
                break
            self._put_back_last(batch)
        passed = self._run_singly(run, batch)
        passed.undisturbed &= not attempts
        return passed

    def _put_back_last(self, batch: Batch) -> None:
        request_id = self._scheduler.put_back_last(batch)
        logger.warning("Request %s waits until another has ended.", request_id)
        batch.num_out_of_memory += 1
        batch.num_preemptions += 1

    def _run_singly(self, run: Execute, batch: Batch) -> Passed:
        """One request at a time, so that only the culprit is lost."""
        passed = Passed([], undisturbed=len(batch.scheduled) == 1)
        ran: list[ScheduledRequest] = []
        num_broken = 0
        for scheduled in batch.scheduled:
            single = Batch([scheduled])
            outcome = _attempt(run, single)
            while outcome is _Failed.OUT_OF_MEMORY:
                batch.num_out_of_memory += 1
                passed.undisturbed = False
                if not _shrink(scheduled):
                    break
                outcome = _attempt(run, single)
            if isinstance(outcome, list):
                ran.append(scheduled)
                passed.committed += outcome
                continue
            passed.undisturbed = False
            num_broken += outcome is _Failed.OTHERWISE
            failure: Failure = "out_of_memory" if outcome is _Failed.OUT_OF_MEMORY else "error"
            passed.failed.append(self._scheduler.fail(scheduled.request.request_id, failure))
        lost_all = bool(batch.scheduled) and num_broken == len(batch.scheduled)
        self._num_lost_steps = self._num_lost_steps + 1 if lost_all else 0
        batch.scheduled = ran
        if self._num_lost_steps == _MAX_LOST_STEPS:
            raise EngineBrokenError(f"{_MAX_LOST_STEPS} steps in a row failed for all their requests.")
        return passed


def _attempt(run: Execute, batch: Batch) -> list[PassResult] | _Failed:
    """What the failed pass held on the device is free once this has returned."""
    try:
        return run(batch)
    except Exception as error:
        names = [scheduled.request.request_id for scheduled in batch.scheduled]
        if not is_out_of_memory(error):
            logger.exception("A pass failed for %s.", names)
            return _Failed.OTHERWISE
        logger.warning("Out of memory in a pass of %d tokens for %s: %s", batch.num_tokens, names, error)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # freed pieces may be too small each for what was asked for
    return _Failed.OUT_OF_MEMORY


def _shrink(scheduled: ScheduledRequest) -> bool:
    """Leave out drafts, then half of a prompt's chunk; False where there is but one token left."""
    if scheduled.num_drafts:
        scheduled.num_drafts, scheduled.allowance, scheduled.chain = 0, NOTHING, NO_CHAIN
    elif scheduled.num_tokens > 1:
        scheduled.num_tokens //= 2
    else:
        return False
    return True
