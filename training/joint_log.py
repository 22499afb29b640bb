"""What a joint run reports: the curves of every step, and lines for people with the time left."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from training.curves import CurveFile
from training.devices import peak_cuda_mb, peak_memory_words, peak_resident_mb

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


class JointLog:
    """The run's curves, a row per step. Nothing is printed where `active` is false, on all devices but the
    first."""

    def __init__(self, directory: Path, num_heads: int, num_steps: int, active: bool) -> None:
        self.num_steps = num_steps
        losses = ["loss_lm", *(f"loss_{k}" for k in range(num_heads))]
        rates = ["lr", "lr_heads", "lambda0"]
        self.curves = CurveFile(
            directory, [*losses, *rates, "tokens_per_second", "peak_memory_mb", "peak_cuda_mb"], active
        )
        self._seconds: list[float] = []

    def add(self, step: int, facts: StepFacts, seconds: float) -> None:
        """Note the step that was just done, counted from 1, and how long it took."""
        rate = facts.tokens / seconds
        losses = [f"{x:.5f}" for x in (facts.loss_lm, *facts.loss_heads)]
        rates = [f"{x:.3e}" for x in (facts.lr, facts.lr_heads, facts.lambda0)]
        self.curves.add(step, [*losses, *rates, f"{rate:.0f}", peak_resident_mb(), peak_cuda_mb()])
        self._seconds.append(seconds)
        if not self.curves.active or (step % STEPS_PER_LINE and step != self.num_steps):
            return
        recent = self._seconds[-STEPS_PER_LINE:]
        left = (self.num_steps - step) * sum(recent) / len(recent)
        print(
            f"step {step}/{self.num_steps}  loss lm {facts.loss_lm:.4f}, heads "
            f"{' '.join(f'{x:.3f}' for x in facts.loss_heads)}  {rate:.0f} tokens/s, {peak_memory_words()}, "
            f"{left / 60:.1f} min left",
            flush=True,
        )
