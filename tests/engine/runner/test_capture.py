"""Which graphs are captured where time or memory is short, and what ends capturing for good."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine.backends.attention import FixedAttention
from engine.backends.rows import PassSize
from engine.errors import GraphCaptureError
from engine.runner.capture import make_graphs
from engine.runner.graphs import Run
from tests.engine.families import full
from tests.engine.graphs import Repeating, gathered_attention, noted_waits
from tests.engine.runner.test_graphs import FEW
from tests.engine.runner.test_greedy import arrivals_of, check_outputs, make_drafter
from tests.engine.tiny import TinyEngine


class Short(Repeating):
    """Has memory for a number of buckets, whose parts are rehearsed twice each. `num_recorded`: parts."""

    def __init__(self, room: int = 100, error: Exception | None = None) -> None:
        super().__init__()
        self._left = 6 * room
        self._error = error or torch.OutOfMemoryError("CUDA out of memory")
        self.num_recorded = 0

    def rehearse(self, run: Run) -> None:
        self._left -= 1
        if self._left < 0:
            raise self._error
        super().rehearse(run)

    def record(self, run: Run) -> Run:
        self.num_recorded += 1
        return super().record(run)


COMMONEST = [max(FEW), *sorted(FEW)[:-1]]  # the largest, which holds any pass, then from the smallest up


@pytest.mark.parametrize("room", [0, 1, 3, 100])
def test_memory_that_is_short_leaves_out_the_seldom_sizes(room: int) -> None:
    engine = TinyEngine(full(12), make_drafter("mixed"), block_size=4, num_blocks=100)
    graphs = make_graphs(engine.runner, FEW, gathered_attention(engine.runner.cache), Short(room))
    assert [graph.bucket for graph in graphs._graphs] == sorted(COMMONEST[:room])
    engine.runner.use_graphs(graphs)
    check_outputs(engine, arrivals_of([2, 3], [0, 3], [6, 9]))


def test_smaller_sizes_are_tried_where_the_largest_has_no_memory() -> None:
    runner = TinyEngine(full(12), make_drafter("mixed"), block_size=4, num_blocks=100).runner
    plain = gathered_attention(runner.cache)

    def make(bucket: PassSize, *arguments: Any) -> FixedAttention:
        if bucket.num_tokens > 20:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(bucket, *arguments)

    assert [graph.bucket for graph in make_graphs(runner, FEW, make, Repeating())._graphs] == sorted(FEW)[:3]


def test_time_that_is_short_leaves_out_the_seldom_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = TinyEngine(full(12), make_drafter("mixed"), block_size=4, num_blocks=100).runner
    capture = Short()
    clock = SimpleNamespace(
        perf_counter=lambda: 10.0 * (capture.num_recorded // 3)
    )  # of a bucket's three parts
    monkeypatch.setattr("engine.runner.capture.time", clock)
    for seconds, count in ((29.0, 3), (19.0, 2), (-1.0, 0)):
        capture.num_recorded = 0
        graphs = make_graphs(runner, FEW, gathered_attention(runner.cache), capture, seconds)
        assert [graph.bucket for graph in graphs._graphs] == sorted(COMMONEST[:count])


class Breaking(Repeating):
    """A capture fails after some have gone well."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self._left, self._error = 3, error

    def record(self, run: Run) -> Run:
        self._left -= 1
        if not self._left:
            raise self._error
        return super().record(run)


@pytest.mark.parametrize(
    "capture",
    [
        Breaking(RuntimeError("operation not permitted when stream is capturing")),
        Breaking(torch.OutOfMemoryError("CUDA out of memory")),
        Short(0, RuntimeError("CUDA error: an illegal memory access was encountered")),
    ],
    ids=["in a capture", "memory in a capture", "before"],
)
def test_what_torch_does_not_recover_from_ends_capturing(capture: Repeating) -> None:
    runner = TinyEngine(full(12), None, block_size=4, num_blocks=100).runner
    with pytest.raises(GraphCaptureError, match="--enforce-eager"):
        make_graphs(runner, FEW, gathered_attention(runner.cache), capture)


def test_sizes_that_the_cache_has_no_room_for_are_left_out() -> None:
    runner = TinyEngine(full(12), None, block_size=4, num_blocks=7).runner
    graphs = make_graphs(runner, FEW, gathered_attention(runner.cache), Repeating())
    assert len(graphs) == 3  # each of eight requests would have no block; four have one, for four tokens


def test_waits_are_noted_though_asking_for_them_is_itself_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []

    def set_sync_debug_mode(mode: str) -> None:
        modes.append(mode)
        warnings.warn("Synchronization debug mode is a prototype feature", UserWarning, stacklevel=1)

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_sync_debug_mode)
    with noted_waits() as waits:
        warnings.warn("called a synchronizing CUDA operation", UserWarning, stacklevel=1)
    assert modes == ["warn", "default"]
    assert waits == ["called a synchronizing CUDA operation"]
