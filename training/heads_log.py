"""What a run on cached rows reports: curves at checkpoints, a line now and then, the gain of the cache."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from training.curves import CurveFile
from training.devices import peak_cuda_mb, peak_memory_words, peak_resident_mb

SECONDS_PER_LINE = 20.0


@dataclass(frozen=True)
class EpochCost:
    """The cost of an epoch. backbone_seconds: of the backbone's pass over the same text, None if unknown."""

    heads_seconds: float
    backbone_seconds: float | None

    def line(self) -> str:
        """For people."""
        heads, backbone = self.heads_seconds, self.backbone_seconds
        text = f"an epoch on the cached hidden states takes {heads:.1f} s"
        if backbone is None:
            return f"{text}; how long computing them took was not noted"
        return (
            f"{text}; computing them took {backbone:.1f} s, {backbone / heads:.1f} times that, so that an "
            f"epoch without the cache would take {(backbone + heads) / heads:.1f} times as long"
        )


class HeadsLog:
    """The curves and lines of a run, from the first step of this process on.

    Nothing is printed where `active` is false, which it is on all devices but the first. Time for checkpoints
    and measurements counts only in the estimate of the time left.
    """

    def __init__(self, directory: Path, num_heads: int, num_steps: int, active: bool) -> None:
        self.num_steps = num_steps
        numbers = [f"{name}_{k}" for name in ("loss", "top1") for k in range(num_heads)]
        columns = ["lr", "seconds", "tokens_per_second", "peak_memory_mb", "peak_cuda_mb"]
        self.curves = CurveFile(directory, [*columns, *numbers], active)
        self.seconds, self.tokens, self.steps = 0.0, 0, 0  # of the steps done in this process
        self._began = self._last_line = time.monotonic()
        self._losses: list[Sequence[float]] = []  # since the last row

    def start(self, step: int) -> None:
        """The first step of this process begins."""
        self.curves.start(step)
        self._began = self._last_line = time.monotonic()

    def add(self, step: int, losses: Sequence[float], tokens: int, seconds: float) -> None:
        """Note the step that was just done, counted from 1. tokens: of its conversations."""
        self.seconds += seconds
        self.tokens += tokens
        self.steps += 1
        self._losses.append(losses)
        if time.monotonic() - self._last_line > SECONDS_PER_LINE:
            self._say(step, "")

    def checkpoint(self, step: int, lr: float, hits: Sequence[float]) -> None:
        """Note a row: mean losses since the last one and the heads' hit rates."""
        numbers = [f"{x:.4f}" for x in (*self._means(), *hits)]
        rate = f"{self.tokens / self.seconds:.0f}"
        memory = [peak_resident_mb(), peak_cuda_mb()]
        self.curves.add(step, [f"{lr:.2e}", f"{self.seconds:.0f}", rate, *memory, *numbers])
        self._say(step, f"  held-out top-1 {' '.join(f'{100 * x:.1f}%' for x in hits)}")
        self._losses.clear()

    def _means(self) -> list[float]:
        return [sum(column) / len(self._losses) for column in zip(*self._losses, strict=True)]

    def _say(self, step: int, hits: str) -> None:
        self._last_line = time.monotonic()
        if not self.curves.active:
            return
        left = (self.num_steps - step) * (self._last_line - self._began) / self.steps
        print(
            f"step {step}/{self.num_steps}  loss {' '.join(f'{x:.3f}' for x in self._means())}{hits}  "
            f"{self.tokens / self.seconds:.0f} tokens/s, {peak_memory_words()}, {left / 60:.1f} min left",
            flush=True,
        )
