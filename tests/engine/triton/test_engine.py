"""The engine with the GPU kernels gives the answers that plain decoding gives."""

from __future__ import annotations

import pytest

from tests.engine.drafters import ScriptedDrafter
from tests.engine.families import full
from tests.engine.helpers import params
from tests.engine.tiny import Arrival, TinyEngine, greedy
from tests.engine.triton.cases import DEVICE

LENGTH = 10
PROMPTS = [tuple((11 * i + 3 * p) % 128 for p in range(length)) for i, length in enumerate((1, 19, 45))]


@pytest.mark.skipif(
    DEVICE.type != "cpu", reason="the tiny engine runs on the CPU, so only interpreted kernels do"
)
def test_greedy_answers_with_trees_and_compaction(monkeypatch: pytest.MonkeyPatch) -> None:
    def script(request_id: str) -> tuple[int, ...]:
        prompt = PROMPTS[int(request_id)]
        return prompt + greedy(prompt, LENGTH)

    engine = TinyEngine(full(9), ScriptedDrafter(script, 0.7, 3), block_size=16, budget=40)
    monkeypatch.setattr(engine.runner.cache, "has_triton", True)
    monkeypatch.setattr("engine.runner.attention.PagedAttention", None)
    arrivals = [
        Arrival(str(i), prompt, params(LENGTH, ignore_eos=True), step=i) for i, prompt in enumerate(PROMPTS)
    ]
    results = engine.run(arrivals)
    for i, prompt in enumerate(PROMPTS):
        assert tuple(results[str(i)].tokens) == greedy(prompt, LENGTH)
    assert engine.num_accepted > 5
