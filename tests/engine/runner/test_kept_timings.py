"""What start-up measured is used by the next start, and a busy moment's measurement does not stay."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.config import EngineConfig
from engine.runner import profile
from engine.runner.kept_timings import KeptTimings, Timings
from engine.runner.profile import measure_costs
from tests.engine.tiny import CPU, TinyEngine

SIZES = (1, 2, 4, 8, 16)


class Machine:
    """Runs of so many seconds by size, and how often each was made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.load = 1.0
        self.made: list[int] = []
        monkeypatch.setattr(profile, "_seconds", lambda run, repeats=3: run())

    def runs(self) -> dict[int, Callable[[], object]]:
        return {size: lambda size=size: self._run(size) for size in SIZES}  # type: ignore[misc]

    def _run(self, size: int) -> float:
        self.made.append(size)
        return self.load * (10.0 + size)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def test_a_later_start_times_a_size_or_two_and_keeps_the_lesser(machine: Machine) -> None:
    first = profile._measure(machine.runs(), {})
    assert machine.made == list(SIZES) and list(first) == list(SIZES)
    machine.made.clear()
    machine.load = 0.9
    second = profile._measure(machine.runs(), first)
    assert machine.made == [1, 8]
    assert second == {**first, 1: 0.9 * 11, 8: 0.9 * 18}
    machine.load = 50.0
    assert profile._measure(machine.runs(), second) == second


def test_what_a_busy_machine_measured_is_measured_again_once_it_is_idle(machine: Machine) -> None:
    machine.load = 3.0
    busy = profile._measure(machine.runs(), {})
    machine.load = 1.0
    assert profile._measure(machine.runs(), busy) == {size: 10.0 + size for size in SIZES}


def test_sizes_that_there_was_no_time_for_are_measured_by_the_next_start(machine: Machine) -> None:
    first = profile._measure(machine.runs(), {}, limit=-1.0)
    assert list(first) == [1, 2]
    assert list(profile._measure(machine.runs(), first)) == list(SIZES)


def test_costs_are_those_of_the_start_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GORGON_HOME", str(tmp_path))
    monkeypatch.setattr(profile, "_WORTH_KEEPING", 0.0)
    engine = TinyEngine(drafts=0)
    limits = engine.scheduler.limits
    first = measure_costs(engine.runner, limits, place(tmp_path))
    monkeypatch.setattr(profile, "_seconds", lambda run, repeats=3: 1000.0)
    assert measure_costs(engine.runner, limits, place(tmp_path)) == first
    assert measure_costs(engine.runner, limits, place(tmp_path, seed=1)) != first


def place(model_dir: Path, **settings: int) -> KeptTimings:
    return KeptTimings(EngineConfig(model_dir=str(model_dir), **settings), CPU)  # type: ignore[arg-type]


def test_timings_come_back_as_they_were_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GORGON_HOME", str(tmp_path / "home"))
    timings: Timings = {"passes": {1: 0.25, 8: 0.5}, "contexts": {}}
    assert place(tmp_path).load() == {}
    place(tmp_path).save(timings)
    assert place(tmp_path).load() == timings
    (tmp_path / "config.json").write_text("{}")  # another model
    assert place(tmp_path).load() == {}


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"passes": 1}', '{"passes": {"a": 1}}', '{"passes": {"1": 0}}', '{"p": {"1": NaN}}'],
)
def test_a_damaged_file_is_no_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str) -> None:
    monkeypatch.setenv("GORGON_HOME", str(tmp_path / "home"))
    place(tmp_path).save({"passes": {1: 0.25}})
    [file] = (tmp_path / "home" / "timings").iterdir()
    assert json.loads(file.read_text())
    file.write_text(text)
    assert place(tmp_path).load() == {}


def test_files_are_bounded_and_a_cache_that_cannot_be_written_is_only_told_of(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("GORGON_HOME", str(tmp_path / "home"))
    for seed in range(70):
        place(tmp_path, seed=seed).save({})
    assert len(list((tmp_path / "home" / "timings").iterdir())) == 64
    monkeypatch.setenv("GORGON_HOME", str(tmp_path / "file"))
    (tmp_path / "file").write_text("no folder")
    place(tmp_path).save({})
    assert "cannot be kept" in caplog.text
