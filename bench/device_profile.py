"""What a GPU does during a run: how long it is busy, and with which kernels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class DeviceProfile:
    """In seconds. Where kernels overlap, `busy` counts the time once."""

    busy: float
    by_kernel: Counter[str]


def profile_device(device: torch.device, run: Callable[[], object]) -> DeviceProfile:
    """device: a CUDA device. Profiling slows down the host, not the device."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.cuda.synchronize(device)
    events = [event for event in profile.events() or () if event.device_type.name == "CUDA"]
    by_kernel = Counter[str]()
    for event in events:  # in microseconds
        by_kernel[event.name] += 1e-6 * (event.time_range.end - event.time_range.start)
    spans = ((event.time_range.start, event.time_range.end) for event in events)
    return DeviceProfile(1e-6 * covered(spans), by_kernel)


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals, each (start, end)."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
