"""The engine with the GPU kernels gives the answers that plain decoding gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.runner.capture import compile_kernels
from tests.engine.backends.triton.cases import DEVICE
from tests.engine.drafters import ScriptedDrafter
from tests.engine.families import full
from tests.engine.helpers import params
from tests.engine.tiny import Arrival, TinyEngine, greedy

LENGTH = 10
PROMPTS = [tuple((11 * i + 3 * p) % 128 for p in range(length)) for i, length in enumerate((1, 19, 45))]


ON_CPU = pytest.mark.skipif(
    DEVICE.type != "cpu", reason="the tiny engine runs on the CPU, so only interpreted kernels do"
)


@ON_CPU
def test_kernels_are_compiled_by_passes_over_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from engine.backends.triton import attention

    runner = TinyEngine(block_size=16).runner
    before = [x.normal_().clone() for x in (runner.cache.k, runner.cache.v)]
    launches: list[Any] = []
    monkeypatch.setattr(attention, "attend", _Counting(attention.attend, launches))
    compile_kernels(runner)
    assert not launches, "the cache is not one that they read"
    monkeypatch.setattr(runner.cache, "has_triton", True)
    compile_kernels(runner)
    assert launches
    assert torch.equal(runner.cache.k, before[0]) and torch.equal(runner.cache.v, before[1])


@ON_CPU
def test_kernels_that_cannot_be_compiled_are_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise FileNotFoundError("Python.h")

    runner = TinyEngine(block_size=16).runner
    monkeypatch.setattr("engine.backends.triton.attention.warm_up", fail)
    monkeypatch.setattr(runner.cache, "has_triton", True)
    compile_kernels(runner)
    assert not runner.cache.has_triton


class _Counting:
    """A kernel that notes its launches."""

    def __init__(self, kernel: Any, launches: list[Any]) -> None:
        self._kernel, self._launches = kernel, launches

    def __getitem__(self, grid: Any) -> Any:
        self._launches.append(grid)
        return self._kernel[grid]


@ON_CPU
def test_greedy_answers_with_trees_and_compaction(monkeypatch: pytest.MonkeyPatch) -> None:
    def script(request_id: str) -> tuple[int, ...]:
        prompt = PROMPTS[int(request_id)]
        return prompt + greedy(prompt, LENGTH)

    engine = TinyEngine(full(9), ScriptedDrafter(script, 0.7, 3), block_size=16, budget=40)
    monkeypatch.setattr(engine.runner.cache, "has_triton", True)
    monkeypatch.setattr("engine.backends.torch.attention.PagedAttention", None)
    arrivals = [
        Arrival(str(i), prompt, params(LENGTH, ignore_eos=True), step=i) for i, prompt in enumerate(PROMPTS)
    ]
    results = engine.run(arrivals)
    for i, prompt in enumerate(PROMPTS):
        assert tuple(results[str(i)].tokens) == greedy(prompt, LENGTH)
    assert engine.num_accepted > 5
