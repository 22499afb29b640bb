"""The engine with the GPU kernels gives the answers that plain decoding gives."""

from __future__ import annotations

from typing import Any

import pytest

from engine.backends.choose import choose
from engine.backends.triton import support
from engine.backends.triton.support import make_triton
from tests.engine.backends.triton.cases import DEVICE, TritonBackend
from tests.engine.drafters import ScriptedDrafter
from tests.engine.families import full
from tests.engine.helpers import params
from tests.engine.tiny import Arrival, TinyEngine, greedy, place

LENGTH = 10
PROMPTS = [tuple((11 * i + 3 * p) % 128 for p in range(length)) for i, length in enumerate((1, 19, 45))]


ON_CPU = pytest.mark.skipif(
    DEVICE.type != "cpu", reason="the tiny engine runs on the CPU, so only interpreted kernels do"
)


@ON_CPU
def test_kernels_are_compiled_by_passes_over_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from engine.backends.triton import attention

    launches: list[Any] = []
    monkeypatch.setattr(attention, "attend", _Counting(attention.attend, launches))
    assert make_triton(place()) is None and not launches, "the device is not one that they run on"
    monkeypatch.setattr(support, "reads_cache", lambda place: True)
    assert isinstance(make_triton(place()), TritonBackend)
    assert launches


@ON_CPU
def test_kernels_that_cannot_be_compiled_are_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise FileNotFoundError("Python.h")

    monkeypatch.setattr("engine.backends.triton.attention.warm_up", fail)
    monkeypatch.setattr(support, "reads_cache", lambda place: True)
    assert make_triton(place()) is None
    assert not isinstance(choose(place()), TritonBackend)


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

    drafter = ScriptedDrafter(script, 0.7, 3)
    engine = TinyEngine(full(9), drafter, block_size=16, budget=40, make_backend=TritonBackend)
    monkeypatch.setattr("engine.backends.torch.backend.PagedAttention", None)
    arrivals = [
        Arrival(str(i), prompt, params(LENGTH, ignore_eos=True), step=i) for i, prompt in enumerate(PROMPTS)
    ]
    results = engine.run(arrivals)
    for i, prompt in enumerate(PROMPTS):
        assert tuple(results[str(i)].tokens) == greedy(prompt, LENGTH)
    assert engine.num_accepted > 5
