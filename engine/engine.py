"""The engine: schedule, execute, update. The one place where the scheduler and the runner meet."""

from __future__ import annotations

import logging
import time

from engine.batch import Batch, PassResult
from engine.containment import Containment
from engine.errors import RequestError
from engine.messages import AddRequest, ModelInfo, StepOutput, StepStats
from engine.model.footprint import weight_bytes
from engine.request_checks import check_request
from engine.runner.runner import Runner
from engine.scheduling.scheduler import Scheduler
from engine.speculation.policy import SpeculationPolicy

logger = logging.getLogger(__name__)


class Engine:
    """Runs a model's requests, synchronously, step by step. `engine.build` makes one.

    policy: the scheduler's, which reports on itself. info: what the runner and the scheduler were built from.
    """

    def __init__(
        self, runner: Runner, scheduler: Scheduler, policy: SpeculationPolicy, info: ModelInfo
    ) -> None:
        self.scheduler = scheduler
        self.info = info
        self._runner = runner
        self._policy = policy
        self._containment = Containment(scheduler)
        self._plans_ahead = runner.works_by_itself
        self._ahead: Batch | None = None  # the next batch, as far as it could be planned
        self._ended: float | None = None  # end of the last step, None after an idle time

    def add_request(self, message: AddRequest) -> None:
        """Queue a request. Raises RequestError for one the model cannot run."""
        check_request(message, self.info)
        if message.request_id in self.scheduler:
            raise RequestError("request_id", f"a request {message.request_id} is running already")
        if not self.scheduler.has_work():
            self._ended = None  # the last request was aborted, and the engine has been idle since
        self.scheduler.add(
            message.request_id, message.prompt_token_ids, message.sampling, message.cache_scope
        )

    def abort(self, request_id: str) -> None:
        self.scheduler.abort(request_id)

    def has_work(self) -> bool:
        return self.scheduler.has_work()

    def weight_bytes(self) -> int:
        """Bytes of weights that every pass reads."""
        return weight_bytes(self._runner.decoder)

    def step(self) -> StepOutput:
        """Advance every running request by one forward pass.

        A request whose pass fails, or lacks memory, even alone ends with "abort". `Containment.execute` says
        more, and when it raises EngineBrokenError.
        """
        start = time.perf_counter()
        ahead, self._ahead = self._ahead, None
        batch = ahead if ahead is not None and self.scheduler.confirm(ahead) else self.scheduler.schedule()
        passed = self._containment.execute(self._run, batch)
        outputs = passed.failed + self.scheduler.update(batch, passed.committed)
        # A step costs all the time since the one before, planning and sending included.
        began, ended = self._ended or start, time.perf_counter()
        self._ended = ended if self.scheduler.has_work() else None
        if passed.undisturbed:
            self.scheduler.learn(batch, ended - began)
        return StepOutput(outputs, self._stats(batch, time.perf_counter() - start))

    def _run(self, batch: Batch) -> list[PassResult]:
        """Run a pass. Where the device works by itself, plan the next one meanwhile. Nothing runs between
        steps."""
        self._ahead = None
        if not self._plans_ahead:
            return self._runner.execute(batch)
        collect = self._runner.launch(batch)
        try:
            self._ahead = self.scheduler.plan_ahead(batch)
            if self._ahead is not None:
                self._runner.prepare(self._ahead)
        except Exception:  # this pass is well under way, and the next will be planned as ever
            logger.exception("The next step could not be planned ahead.")
            self._ahead = None
        return collect()

    def _stats(self, batch: Batch, duration: float) -> StepStats:
        decided, report = batch.speculation, self._policy.report()
        levels = range(max((s.draft_depth for s in batch.scheduled), default=0))
        drafted_by_depth = [sum(s.draft_depth > level for s in batch.scheduled) for level in levels]
        accepted_by_depth = [sum(s.num_accepted > level for s in batch.scheduled) for level in levels]
        return StepStats(
            duration=duration,
            num_tokens=batch.num_tokens,
            committed_tokens=[s.num_committed for s in batch.scheduled if s.num_committed],
            drafted_tokens=sum(s.num_drafts for s in batch.scheduled),
            accepted_by_depth=accepted_by_depth,
            drafted_by_depth=drafted_by_depth,
            num_running=self.scheduler.num_running,
            num_waiting=self.scheduler.num_waiting,
            kv_usage=self.scheduler.kv_usage,
            preemptions=batch.num_preemptions,
            out_of_memory=batch.num_out_of_memory,
            prefix_queries=batch.prefix_queries,
            prefix_hits=batch.prefix_hits,
            speculation=decided.state,
            estimated_speed_up=decided.estimated,
            measured_speed_up=report.measured,
        )
