"""Memory that runs out anywhere in a pass: the last requests wait, no answer changes, nothing is lost."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine.batch import Batch, PassResult
from engine.build import build
from engine.engine import Engine
from engine.messages import AddRequest, RequestOutput, StepStats
from engine.runner.device import is_out_of_memory
from engine.runner.draft_model import DraftModelDrafter, first_layers
from engine.runner.drafter import ChainDrafter, Drafter
from tests.engine.families import full
from tests.engine.helpers import params
from tests.engine.processes import config_for, tokens_of
from tests.engine.runner.test_heads_drafter import bound, drafter_of, hydra
from tests.engine.tiny import VOCAB, Arrival, TinyEngine, tiny_backend, tiny_decoder

CPU_MESSAGE = "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to"
LENGTH = 30
PROMPTS = [[(11 * i + 3 * p + p * p) % VOCAB for p in range(n)] for i, n in enumerate((3, 20, 37, 50, 9))]
DRAFTERS: dict[str, Callable[[], Drafter]] = {
    "n-grams": ChainDrafter,
    "hydra": lambda: drafter_of(bound(hydra())),
    "draft model": lambda: DraftModelDrafter(first_layers(tiny_decoder(), 1), tiny_backend()),
}


class Faults(TorchDispatchMode):
    """Raises at operator number `place` of every pass, counted from its beginning."""

    def __init__(self, place: int | None) -> None:
        super().__init__()
        self.place = place
        self.num_operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num_operators += 1
        if self.num_operators == self.place:
            raise (
                RuntimeError(CPU_MESSAGE) if self.place % 2 else torch.OutOfMemoryError("CUDA out of memory")
            )
        return func(*args, **(kwargs or {}))


class FaultyRunner:
    """The engine's own runner, but some of its passes run out of memory in one of the first

    pass always has memory for."""

    def __init__(self, engine: Engine, share: float, seed: int = 0, most: int = 1, places: int = 400) -> None:
        self._execute = engine._runner.execute
        self._generator = random.Random(seed)
        self._share = share
        self._most, self._places = most, places
        self.num_faults = 0

    def execute(self, batch: Batch) -> list[PassResult]:
        tight = len(batch.scheduled) > self._most and self._generator.random() < self._share
        try:
            with Faults(self._generator.randrange(1, self._places) if tight else None):
                return self._execute(batch)
        except RuntimeError:
            self.num_faults += 1
            raise


def make_engine(folder: Path, drafter: str, **settings: Any) -> Engine:
    sizes = {"kv_cache_memory": 1 << 20, "max_num_batched_tokens": 48}
    return build(
        config_for(folder, **{**sizes, **settings}),
        fixed_drafts=5,
        drafter=DRAFTERS[drafter](),
        family=full(8, 3, 3),
    )


def run(engine: Engine, **sampling: Any) -> tuple[dict[int, list[RequestOutput]], list[StepStats]]:
    outputs: dict[int, list[RequestOutput]] = {index: [] for index in range(len(PROMPTS))}
    stats = []
    for index, prompt in enumerate(PROMPTS):
        engine.add_request(AddRequest(str(index), prompt, params(LENGTH, ignore_eos=True, **sampling)))
    while engine.has_work():
        step = engine.step()
        engine.scheduler.check_integrity()
        stats.append(step.stats)
        for output in step.outputs:
            outputs[int(output.request_id)].append(output)
    assert engine.scheduler.kv_usage == 0.0
    return outputs, stats


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "seed": 3}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_answers_are_those_of_an_undisturbed_run(
    tiny_model_dir: Path, drafter: str, sampling: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, calm = run(make_engine(tiny_model_dir, drafter), **sampling)
    assert not any(step.out_of_memory for step in calm)
    engine = make_engine(tiny_model_dir, drafter)
    faulty = FaultyRunner(engine, 0.2, seed=len(drafter))
    monkeypatch.setattr(engine, "_runner", faulty)
    outputs, stats = run(engine, **sampling)
    for index in expected:
        assert tokens_of(outputs[index]) == tokens_of(expected[index])
        assert [o.finish_reason for o in outputs[index] if o.finish_reason] == ["length"]
    assert faulty.num_faults == sum(step.out_of_memory for step in stats) >= 5
    assert sum(step.preemptions for step in stats) == faulty.num_faults


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_a_repeated_pass_brings_what_the_first_would_have(
    drafter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever a pass fails, tokens and accepted drafts of its repetition are those of a pass that does not:
    what drafters remember of a request is not spoilt."""
    arrivals = [Arrival(str(i), p, params(12, ignore_eos=True), step=i) for i, p in enumerate(PROMPTS)]

    def outputs_of(places: Callable[[int], int | None], counts: list[int]) -> list[RequestOutput]:
        engine = TinyEngine(full(8, 3, 3), DRAFTERS[drafter](), budget=48)
        execute = engine.runner.execute

        def execute_twice(batch: Batch) -> list[PassResult]:
            place = places(len(counts))
            with Faults(place) as faults:
                if place is not None:
                    with pytest.raises(RuntimeError, match="memory"):
                        execute(batch)
                    counts.append(0)
                    return execute(batch)
                committed = execute(batch)
                counts.append(faults.num_operators)
                return committed

        monkeypatch.setattr(engine.runner, "execute", execute_twice)
        return [o for result in engine.run(arrivals).values() for o in result.outputs]

    operators: list[int] = []
    expected = outputs_of(lambda _: None, operators)
    generator = random.Random(0)
    for share in (1.0, 1.0, 0.1, 0.1, 0.1):  # all places of a pass, and its last ones
        places = [count - generator.randrange(max(1, int(share * count))) for count in operators]
        assert outputs_of(places.__getitem__, []) == expected


def test_who_waits_comes_back_when_another_has_ended(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(tiny_model_dir, "n-grams", max_num_seqs=5, max_num_batched_tokens=256)
    monkeypatch.setattr(engine, "_runner", FaultyRunner(engine, 1.0, most=3, places=100))
    outputs, stats = run(engine)
    assert [step.out_of_memory for step in stats[:3]] == [2, 0, 0]  # of the five that came, three run
    assert stats[1].num_running == 3 and stats[1].num_waiting == 2
    assert all(len(tokens_of(outputs[index])) == LENGTH for index in outputs)


def test_who_waits_is_tried_again_though_nobody_ends(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory may come back: another process had it, or one long prompt."""
    monkeypatch.setattr("engine.scheduling.scheduler._STEPS_WHEN_SHORT", 4)
    engine = make_engine(tiny_model_dir, "n-grams", max_num_seqs=5, max_num_batched_tokens=256)
    monkeypatch.setattr(engine, "_runner", TightRunner(engine, 4))
    for index in range(5):
        engine.add_request(AddRequest(str(index), [index] * 3, params(LENGTH, ignore_eos=True)))
    engine.step()
    monkeypatch.setattr(engine._runner, "_most_tokens", 1000)
    running = [engine.step().stats.num_running for _ in range(5)]
    assert running == [1, 1, 1, 5, 5]


class TightRunner:
    """The engine's own runner, for passes of so many tokens at most; none at all for some requests."""

    def __init__(self, engine: Engine, most_tokens: int, never: str | None = None) -> None:
        self._execute = engine._runner.execute
        self._most_tokens = most_tokens
        self._never = never

    def execute(self, batch: Batch) -> list[PassResult]:
        if batch.num_tokens > self._most_tokens or any(
            s.request.request_id == self._never for s in batch.scheduled
        ):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return self._execute(batch)


def test_one_request_alone_makes_do_with_less(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = run(make_engine(tiny_model_dir, "draft model"))
    engine = make_engine(tiny_model_dir, "draft model")
    monkeypatch.setattr(engine, "_runner", TightRunner(engine, 4))  # chunks of 48, trees of 6
    outputs, _ = run(engine)
    assert all(tokens_of(outputs[index]) == tokens_of(expected[index]) for index in expected)


def test_a_request_that_never_fits_fails_alone(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = run(make_engine(tiny_model_dir, "n-grams"))
    engine = make_engine(tiny_model_dir, "n-grams")
    for never in (0, 2, 4, 1, 3):  # more often than an engine may lose whole steps otherwise
        with monkeypatch.context() as patch:
            patch.setattr(engine, "_runner", TightRunner(engine, 256, str(never)))
            outputs, stats = run(engine)
        assert [(o.finish_reason, o.failure, o.token_ids) for o in outputs[never]] == [
            ("abort", "out_of_memory", [])
        ]
        for index in set(expected) - {never}:
            assert tokens_of(outputs[index]) == tokens_of(expected[index])
        assert sum(step.out_of_memory for step in stats) >= 1


def test_what_means_out_of_memory() -> None:
    real = []
    for allocate in (
        lambda: torch.empty(1 << 60),
        lambda: torch.empty(1 << 62),
        lambda: np.zeros(1 << 60),
        lambda: np.zeros(1 << 64),
        lambda: np.zeros((1 << 40, 1 << 40)),
    ):
        with pytest.raises((RuntimeError, MemoryError, ValueError)) as caught:
            allocate()
        real.append(caught.value)
    for error in (
        *real,
        torch.OutOfMemoryError("CUDA out of memory."),
        MemoryError(),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ):
        assert is_out_of_memory(error)
    for other in (RuntimeError("CUDA error: an illegal memory access was encountered"), ValueError("memory")):
        assert not is_out_of_memory(other)
