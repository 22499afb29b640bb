"""How fast this machine reads memory: the floor under the time of a pass, which reads every weight once."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

_BYTES = 512 * 2**20  # many times any cache
_REPEATS = 3


class Bandwidth:
    """Reads and copies per second. Machines drift, so it is measured again between other measurements, and
    the best result counts. torch does it on as many threads as the engine has."""

    def __init__(self, device: torch.device) -> None:
        self._source = torch.ones(_BYTES // 4, dtype=torch.float32, device=device)
        self._target = torch.empty_like(self._source)
        self.read = 0.0  # bytes per second
        self.copy = 0.0  # bytes per second, read and written

    def measure(self) -> None:
        self.read = max(self.read, _BYTES / self._fastest(lambda: self._source.sum()))
        self.copy = max(self.copy, 2 * _BYTES / self._fastest(lambda: self._target.copy_(self._source)))

    @property
    def facts(self) -> dict[str, int]:
        """For the JSON of a benchmark."""
        return {"read_bytes_per_second": round(self.read), "copy_bytes_per_second": round(self.copy)}

    @property
    def sentence(self) -> str:
        """For people."""
        return f"memory reads {self.read / 1e9:.1f} GB/s, copies {self.copy / 1e9:.1f} GB/s"

    @property
    def best(self) -> float:
        """Bytes per second that a pass could read at most; on some machines a copy moves more."""
        return max(self.read, self.copy)

    def _fastest(self, run: Callable[[], object]) -> float:
        return min(elapsed_seconds(self._source.device, run) for _ in range(_REPEATS))


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
