"""The engine benchmark counts what an engine reports, on an engine whose every number is known."""

from __future__ import annotations

import json
from typing import Any

import pytest

from bench.engine import one_at_a_time, side_by_side
from bench.report import mean_and_std, print_table, quartiles
from bench.summary import acceptance_by_depth, compare, summarize
from engine.answering import EngineMode, Run
from engine.messages import AddRequest, ModelInfo, RequestOutput, RequestUsage, StepOutput, StepStats

USAGE = RequestUsage(cached_tokens=0, decode_steps=0, drafted_tokens=0, accepted_tokens=0)


class CountingEngine:
    """Answers every request with 0, 1, 2, ..., `tokens_per_step` at a time, up to its limit."""

    info: ModelInfo

    def __init__(self, tokens_per_step: int) -> None:
        self.tokens_per_step = tokens_per_step
        self.running: dict[str, tuple[AddRequest, int]] = {}
        self.most_running = 0
        self.prompts: list[list[int]] = []

    def add_request(self, request: AddRequest) -> None:
        self.running[request.request_id] = (request, 0)
        self.prompts.append(request.prompt_token_ids)

    def has_work(self) -> bool:
        return bool(self.running)

    def step(self) -> StepOutput:
        self.most_running = max(self.most_running, len(self.running))
        outputs = []
        for request_id, (request, done) in list(self.running.items()):
            end = min(done + self.tokens_per_step, request.sampling.max_tokens)
            finished = end == request.sampling.max_tokens
            outputs.append(
                RequestOutput(
                    request_id=request_id,
                    token_ids=list(range(done, end)),
                    usage=USAGE,
                    finish_reason="length" if finished else None,
                )
            )
            self.running[request_id] = (request, end)
            if finished:
                del self.running[request_id]
        drafts = self.tokens_per_step - 1
        stats = StepStats(
            duration=0.0,
            num_tokens=len(outputs),
            committed_tokens=[len(output.token_ids) for output in outputs],
            drafted_tokens=drafts * len(outputs),
            accepted_by_depth=[len(outputs)] * drafts,
            drafted_by_depth=[2 * len(outputs)] * drafts,
            num_running=len(outputs),
            num_waiting=0,
            kv_usage=0.0,
            preemptions=0,
            prefix_queries=0,
            prefix_hits=0,
        )
        return StepOutput(outputs, stats)


def modes() -> list[EngineMode]:
    return [EngineMode("auto", CountingEngine(3)), EngineMode("off", CountingEngine(1))]


def test_a_run_counts_tokens_and_steps() -> None:
    run = EngineMode("auto", CountingEngine(3)).run([5, 6, 7], max_tokens=8)
    assert run.outputs == {0: list(range(8))}
    assert run.committed == [3, 3, 2]
    assert (run.steps, run.drafted) == (3, 6)
    assert acceptance_by_depth([run]) == [0.5, 0.5]
    assert run.first_token_seconds is not None and run.first_token_seconds <= run.seconds


def test_a_closed_loop_keeps_the_number_running() -> None:
    engine = CountingEngine(2)
    run = EngineMode("auto", engine).run_many([[i] for i in range(7)], max_tokens=5, concurrency=3)
    assert engine.most_running == 3
    assert all(tokens == list(range(5)) for tokens in run.outputs.values())
    assert run.num_tokens == 35


def test_a_modes_temperature_is_that_of_its_requests() -> None:
    class Noting(CountingEngine):
        def add_request(self, request: AddRequest) -> None:
            super().add_request(request)
            asked.append((request.sampling.temperature, request.sampling.seed))

    asked: list[tuple[float, int | None]] = []
    mode = EngineMode("auto", Noting(3), temperature=0.7)
    mode.run([5], max_tokens=2)
    mode.run_many([[5], [6]], max_tokens=2, concurrency=2)
    mode.run_sampled([5], 2, temperature=1.0, seed=9)
    assert asked == [(0.7, 0), (0.7, 0), (0.7, 0), (1.0, 9)]


def test_every_mode_answers_every_prompt(capsys: Any) -> None:
    both = modes()
    token_ids = [[i, 1] for i in range(4)]
    result = one_at_a_time(both, token_ids, max_tokens=6)
    for mode in both:
        assert isinstance(mode.engine, CountingEngine)
        assert mode.engine.prompts == token_ids
    assert result["modes"]["auto"]["tokens_per_step"] == {"mean": 3.0, "std": 0.0, "count": 8}
    assert result["ratios"]["auto/off"]["identical"] == 4
    json.dumps(result)
    assert "auto/off end to end" in capsys.readouterr().out


def test_rounds_have_prompts_of_their_own(capsys: Any) -> None:
    both = modes()
    token_ids = [[i] for i in range(6)]
    result = side_by_side(both, token_ids, max_tokens=4, concurrency=2, rounds=2)
    for mode in both:
        assert isinstance(mode.engine, CountingEngine)
        assert mode.engine.prompts == [[0], [2], [4], [1], [3], [5]]
    assert set(result["ratios"]) == {"auto/off"}
    assert result["modes"]["off"]["tokens_per_step"]["mean"] == 1.0
    json.dumps(result)


def run_of(seconds: float, tokens: int) -> Run:
    return Run(
        seconds=seconds, first_token_seconds=0.0, outputs={0: [1] * tokens}, committed=[tokens], steps=1
    )


def test_ratios_are_taken_prompt_by_prompt() -> None:
    runs = {"auto": [run_of(1, 10), run_of(2, 10)], "off": [run_of(2, 10), run_of(8, 10)]}
    ratio = compare(runs, "auto", "off")
    assert ratio["end_to_end"] == {"q1": 2.5, "median": 3.0, "q3": 3.5}
    assert ratio["of_totals"] == pytest.approx(10 / 3, abs=1e-3)
    assert ratio["identical"] == 2


def test_an_answer_of_one_step_has_no_decode_rate() -> None:
    run = Run(seconds=1.0, first_token_seconds=1.0, outputs={0: [1]}, committed=[1], steps=1)
    assert run.decode_tokens_per_second is None
    assert summarize([run])["decode_tokens_per_second"] is None
    assert compare({"auto": [run], "off": [run]}, "auto", "off")["decode"] is None


def test_quartiles_and_spread() -> None:
    assert quartiles([1.0]) == {"q1": 1.0, "median": 1.0, "q3": 1.0}
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == {"q1": 2.0, "median": 3.0, "q3": 4.0}
    assert mean_and_std([1, 3]) == {"mean": 2.0, "std": 1.0, "count": 2}


def test_tables_line_up(capsys: Any) -> None:
    print_table(["name", "value"], [["a", 1.5], ["longer", None]])
    assert capsys.readouterr().out == "name    value\n------  -----\na        1.50\nlonger      -\n\n"
