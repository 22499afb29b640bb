"""What the device itself does of a step: how long it is busy, and what a run takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import torch


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals, each (start, end)."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def busy_seconds(device: torch.device, run: Callable[[], object]) -> float | None:
    """Seconds of a run in which anything ran on the device; None where the host is the device."""
    if device.type != "cuda":
        run()
        return None
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.cuda.synchronize(device)
    return 1e-6 * covered(  # events are in microseconds
        (event.time_range.start, event.time_range.end)
        for event in profile.events() or ()
        if event.device_type.name == "CUDA"
    )


def elapsed_seconds(device: torch.device, run: Callable[[], object]) -> float:
    """Seconds of a run by the device's own clock, where it has one."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    first, last = (
        torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        for _ in range(2)
    )
    first.record()
    run()
    last.record()
    torch.cuda.synchronize(device)
    return float(first.elapsed_time(last)) / 1000


def repeatable(device: torch.device, run: Callable[[], object]) -> tuple[Callable[[], object], bool]:
    """What does the same again at the least cost for the host: a CUDA graph where the device has them and the
    run can be captured. And whether it is one."""
    run()  # whatever is compiled or allocated the first time
    if device.type != "cuda":
        return run, False
    stream, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        run()
    current.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            run()
        graph.replay()
        torch.cuda.synchronize(device)
    except RuntimeError:
        return run, False
    return graph.replay, True
