"""What a joint run tells while it runs: a CSV file of its curves, and lines for people with the time left."""

from __future__ import annotations

import csv
import resource
from dataclasses import dataclass
from pathlib import Path

import torch

LOG_FILE = "log.csv"
STEPS_PER_LINE = 10


@dataclass(frozen=True)
class StepFacts:
    """One step: mean losses over its answer positions, rates, and how many tokens the backbone read."""

    loss_lm: float
    loss_heads: list[float]
    lr: float
    lr_heads: float
    lambda0: float
    tokens: int  # padding included


def peak_memory_bytes() -> int:
    """The most this process has held: on the CUDA device where there is one, else of the host's memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


class JointLog:
    """log.csv in the run's directory, a row per step; silent where `active` is false, as on all devices but
    the first."""

    def __init__(self, directory: Path, num_heads: int, num_steps: int, active: bool) -> None:
        self.path, self.num_steps, self.active = directory / LOG_FILE, num_steps, active
        names = [f"loss_{k}" for k in range(num_heads)]
        self.header = [
            "step", "loss_lm", *names, "lr", "lr_heads", "lambda0", "tokens_per_second", "peak_memory_mb"
        ]  # fmt: skip
        self._seconds: list[float] = []

    def start(self, step: int) -> None:
        """Begin the file where there is none or the run is a new one."""
        if self.active and (step == 0 or not self.path.exists()):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(",".join(self.header) + "\n")

    def cut(self, step: int) -> None:
        """Drop the rows of steps that were lost when the run was killed."""
        if self.active and self.path.exists():
            header, *rows = self.path.read_text().splitlines(True)
            self.path.write_text(header + "".join(r for r in rows if int(r.split(",")[0]) <= step))

    def add(self, step: int, facts: StepFacts, seconds: float) -> None:
        """Note the step that was just done, counted from 1, and how long it took."""
        if not self.active:
            return
        rate, memory = facts.tokens / seconds, peak_memory_bytes() >> 20
        losses = [f"{x:.5f}" for x in (facts.loss_lm, *facts.loss_heads)]
        rates = [f"{x:.3e}" for x in (facts.lr, facts.lr_heads, facts.lambda0)]
        with self.path.open("a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow([step, *losses, *rates, f"{rate:.0f}", memory])
        self._seconds.append(seconds)
        if step % STEPS_PER_LINE and step != self.num_steps:
            return
        recent = self._seconds[-STEPS_PER_LINE:]
        left = (self.num_steps - step) * sum(recent) / len(recent)
        print(
            f"step {step}/{self.num_steps}  loss lm {facts.loss_lm:.4f}, heads "
            f"{' '.join(f'{x:.3f}' for x in facts.loss_heads)}  {rate:.0f} tokens/s, peak {memory} MB, "
            f"{left / 60:.1f} min left",
            flush=True,
        )
