"""Requests whose passes raise: only they are lost, and an engine that loses them all gives up."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.batch import Batch, PassResult
from engine.build import build
from engine.engine import Engine
from engine.errors import (
    EngineBrokenError,
)
from engine.messages import AddRequest, RequestOutput
from tests.engine.helpers import params
from tests.engine.processes import PROMPT, config_for, tokens_of


class FailingRunner:
    """The engine's own runner, but a pass with one of these requests in it fails."""

    def __init__(self, engine: Engine, culprits: set[str]) -> None:
        self._execute = engine._runner.execute
        self._culprits = culprits

    def execute(self, batch: Batch) -> list[PassResult]:
        committed = self._execute(batch)  # fails late: all of the pass has been written
        if self._culprits & {scheduled.request.request_id for scheduled in batch.scheduled}:
            raise RuntimeError("this request is cursed")
        return committed


def run_with_culprits(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, names: str, culprits: str
) -> dict[str, list[RequestOutput]]:
    monkeypatch.setattr(engine, "_runner", FailingRunner(engine, set(culprits)))
    outputs: dict[str, list[RequestOutput]] = {name: [] for name in names}
    for name in names:
        engine.add_request(AddRequest(name, [*PROMPT, ord(name)], params(20, ignore_eos=True)))
    while engine.has_work():
        for output in engine.step().outputs:
            outputs[output.request_id].append(output)
    engine.scheduler.check_integrity()
    return outputs


def test_request_that_breaks_takes_down_only_itself(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        expected = run_with_culprits(build(config_for(tiny_model_dir)), patch, "abcdef", "")
    engine = build(config_for(tiny_model_dir))
    for _ in range(2):  # the lost request leaves nothing behind
        with monkeypatch.context() as patch:
            outputs = run_with_culprits(engine, patch, "abcdef", "c")
        for name in "abdef":
            assert tokens_of(outputs[name]) == tokens_of(expected[name])
            assert outputs[name][-1].finish_reason == "length"
        assert [(o.token_ids, o.finish_reason) for o in outputs["c"]] == [([], "abort")]
    assert engine.scheduler.kv_usage == 0.0


def test_engine_that_fails_every_request_gives_up(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = build(config_for(tiny_model_dir))
    for name in "abcd":  # one lost request at a time, with a good one in between, is no broken engine
        with monkeypatch.context() as patch:
            run_with_culprits(engine, patch, name, name)
            run_with_culprits(engine, patch, "z", "")
    with pytest.raises(EngineBrokenError):
        run_with_culprits(engine, monkeypatch, "abcdefghijklm", "abcdefghijklm")
