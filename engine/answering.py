"""Answers prompts with an engine in this process, without a server, and notes how long it took."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from engine.messages import AddRequest, ModelInfo, SamplingParams, StepOutput


class Engine(Protocol):
    """What is used of `engine.engine.Engine`."""

    @property
    def info(self) -> ModelInfo: ...
    def add_request(self, request: AddRequest) -> Any: ...
    def has_work(self) -> bool: ...
    def step(self) -> StepOutput: ...


@dataclass
class Run:
    """One prompt answered by one mode, or several at once. Times in seconds from the start.

    `committed` has one entry per request and step that committed tokens: how many.
    """

    seconds: float = 0.0
    first_token_seconds: float | None = None
    outputs: dict[int, list[int]] = field(default_factory=dict)  # token ids by index of the prompt
    committed: list[int] = field(default_factory=list)
    steps: int = 0
    drafted: int = 0
    accepted_by_depth: list[int] = field(default_factory=list)
    drafted_by_depth: list[int] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.outputs.values()))

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds

    @property
    def decode_tokens_per_second(self) -> float | None:
        """Without the prompt's pass and the token that it gives; None for an answer of one step."""
        if self.first_token_seconds is None or self.seconds <= self.first_token_seconds:
            return None
        return (self.num_tokens - 1) / (self.seconds - self.first_token_seconds)


class EngineMode:
    """An engine in this process, so that nothing but the engine is measured.

    What is drawn at a temperature depends on seed and position alone: it is the same in every mode.
    """

    def __init__(self, name: str, engine: Engine, temperature: float = 0.0) -> None:
        self.name = name
        self.engine = engine
        self.temperature = temperature  # where a run does not say
        self._num_requests = 0

    def run(self, prompt: Sequence[int], max_tokens: int) -> Run:
        return self.run_many([prompt], max_tokens, concurrency=1)

    def run_sampled(self, prompt: Sequence[int], max_tokens: int, temperature: float, seed: int) -> Run:
        return self.run_many([prompt], max_tokens, 1, temperature, seed)

    def run_many(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        concurrency: int,
        temperature: float | None = None,
        seed: int = 0,
    ) -> Run:
        """Answer all prompts, `concurrency` at a time: a new one starts when one is done.

        Raises RequestError for a prompt that the engine cannot run.
        """
        run = Run(outputs={index: [] for index in range(len(prompts))})
        waiting = deque(enumerate(prompts))
        index_of: dict[str, int] = {}
        temperature = self.temperature if temperature is None else temperature
        sampling = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)
        start = time.perf_counter()
        while waiting or index_of:
            while waiting and len(index_of) < concurrency:
                index, prompt = waiting.popleft()
                request_id = f"{self.name}-{self._num_requests}"
                self._num_requests += 1
                index_of[request_id] = index
                self.engine.add_request(
                    AddRequest(request_id=request_id, prompt_token_ids=list(prompt), sampling=sampling)
                )
            step = self.engine.step()
            run.steps += 1
            for output in step.outputs:
                run.outputs[index_of[output.request_id]] += output.token_ids
                if output.finish_reason is not None:
                    del index_of[output.request_id]
            run.committed += step.stats.committed_tokens
            run.drafted += step.stats.drafted_tokens
            _add(run.accepted_by_depth, step.stats.accepted_by_depth)
            _add(run.drafted_by_depth, step.stats.drafted_by_depth)
            if run.first_token_seconds is None and step.stats.committed_tokens:
                run.first_token_seconds = time.perf_counter() - start
        run.seconds = time.perf_counter() - start
        return run


def _add(totals: list[int], values: Sequence[int]) -> None:
    totals += [0] * (len(values) - len(totals))
    for index, value in enumerate(values):
        totals[index] += value
