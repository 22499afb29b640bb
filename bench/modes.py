"""The things that `gorgon bench engine` compares: engines set up differently, and transformers' generate.

A mode answers one prompt and reports when tokens came. An engine mode can also keep several
requests running.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
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


class Mode(Protocol):
    name: str

    def run(self, prompt: list[int], max_tokens: int) -> Run: ...


class EngineMode:
    """An engine in this process, so that nothing but the engine is measured.

    What is drawn at a temperature depends on seed and position alone: it is the same in every mode.
    """

    def __init__(self, name: str, engine: Engine, temperature: float = 0.0) -> None:
        self.name = name
        self.engine = engine
        self.temperature = temperature  # where a run does not say
        self._num_requests = 0

    def run(self, prompt: list[int], max_tokens: int) -> Run:
        return self.run_many([prompt], max_tokens, concurrency=1)

    def run_sampled(self, prompt: list[int], max_tokens: int, temperature: float, seed: int) -> Run:
        return self.run_many([prompt], max_tokens, 1, temperature, seed)

    def run_many(
        self,
        prompts: Sequence[list[int]],
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
                    AddRequest(request_id=request_id, prompt_token_ids=prompt, sampling=sampling)
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


class TransformersMode:
    """`transformers.generate`, greedy, in the engine's dtype: what one would use without us."""

    name = "transformers"

    def __init__(self, model_dir: Path, info: ModelInfo) -> None:
        import torch
        from transformers import AutoModelForCausalLM, GgufConfig

        self._torch = torch
        self._eos_token_ids = list(info.eos_token_ids)
        ggufs = sorted(model_dir.glob("*.gguf"))
        options: dict[str, Any] = {}
        if ggufs:
            # Left packed, as is the default, every matrix would be unpacked anew in each pass.
            options["gguf_file"] = ggufs[0].name
            options["quantization_config"] = GgufConfig(dequantize=True)
        options["dtype"] = getattr(torch, info.dtype.removeprefix("torch."))
        self._model = AutoModelForCausalLM.from_pretrained(model_dir, **options).to(info.device).eval()

    def run(self, prompt: list[int], max_tokens: int) -> Run:
        torch = self._torch
        clock = _FirstToken()
        input_ids = torch.tensor([prompt], device=self._model.device)
        start = time.perf_counter()
        with torch.inference_mode():
            output = self._model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                do_sample=False,
                max_new_tokens=max_tokens,
                eos_token_id=self._eos_token_ids,
                pad_token_id=self._eos_token_ids[0],
                streamer=clock,
            )
        tokens = output[0, len(prompt) :].tolist()
        return Run(
            seconds=time.perf_counter() - start,
            first_token_seconds=None if clock.at is None else clock.at - start,
            outputs={0: tokens},
            committed=[1] * len(tokens),
            steps=len(tokens),
        )


class _FirstToken:
    """A streamer that notes when the first token came; generate hands it the prompt before."""

    def __init__(self) -> None:
        self.at: float | None = None
        self._seen_prompt = False

    def put(self, value: Any) -> None:
        if not self._seen_prompt:
            self._seen_prompt = True
        elif self.at is None:
            self.at = time.perf_counter()

    def end(self) -> None: ...


def _add(totals: list[int], values: Sequence[int]) -> None:
    totals += [0] * (len(values) - len(totals))
    for index, value in enumerate(values):
        totals[index] += value
