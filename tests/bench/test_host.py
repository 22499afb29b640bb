"""The host benchmark drives the real scheduler, every request drafting in every step."""

from __future__ import annotations

import json
from typing import Any

from bench.host import WARM_UP_STEPS, make_results, make_scheduler, measure, run
from engine.messages import SamplingParams


def test_steps_are_timed_and_full_of_drafts() -> None:
    seconds, drafts = measure(num_requests=4, num_steps=10)
    assert len(seconds) == 10 and min(seconds) > 0
    assert drafts > 4 * 10 * 30  # of at most 63 each


def test_the_scheduler_stays_whole() -> None:
    import random

    scheduler = make_scheduler(num_requests=3, num_steps=5)
    for index in range(3):
        scheduler.add(str(index), list(range(index, index + 256)), SamplingParams(max_tokens=10**6))
    for _ in range(WARM_UP_STEPS + 5):
        batch = scheduler.schedule()
        assert len(batch.scheduled) == 3 and not batch.num_preemptions
        scheduler.update(batch, make_results(batch, random.Random(0)))
        scheduler.check_integrity()


def test_the_last_line_is_json(capsys: Any) -> None:
    assert run(num_requests=2, num_steps=3) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["ms_per_step"]["median"] > 0
    assert {"cpu", "cores", "torch", "date", "command"} <= document.keys()
