"""Medusa-1: heads learn on the cached hidden rows of a frozen backbone.

The loss is the sum over heads k of 0.8^k times the mean cross-entropy of head k, over the positions whose
target lies in the token map. The batch of step s is a function of (seed, s) alone, so that a run that was
killed and taken up again ends with the same weights as an unbroken one.
"""

from __future__ import annotations

import csv
import json
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.errors import GorgonError
from heads.checkpoint import save_heads
from heads.medusa import MedusaHeads
from training.hidden_states import HiddenCache
from training.vocabulary_loss import vocabulary_loss

HEAD_DECAY = 0.8  # weight of head k in the loss: 0.8^k
WEIGHT_DECAY = 0.01
STATE_FILE = "trainer.pt"
LOG_FILE = "log.csv"


class TrainingError(GorgonError):
    """A run that cannot go on; the message says from where it can be taken up."""


@dataclass(frozen=True, kw_only=True)
class Medusa1Config:
    """What is trained, and how. `vocab` is the size of the token map, at most the whole vocabulary."""

    heads: int = 4
    layers: int = 3
    vocab: int = 8192
    root_input: bool = True
    epochs: float = 4.0
    batch: int = 1024
    lr: float = 1.5e-3
    warmup: int = 100
    seed: int = 0
    checkpoint_every: int = 250


def token_map(cache: HiddenCache, size: int, vocab_size: int) -> Tensor | None:
    """The `size` tokens most frequent in the training answers, ascending; None for the whole vocabulary."""
    if size >= vocab_size:
        return None
    counts = torch.bincount(cache.next_tokens[cache.rows(~cache.held_out)], minlength=vocab_size)
    return counts.argsort(descending=True, stable=True)[:size].sort().values


class Medusa1Trainer:
    """One run in one directory, which holds the trainer's state, a log and the head set as last saved."""

    def __init__(
        self,
        config: Medusa1Config,
        cache: HiddenCache,
        embedding: Tensor,  # [vocab, hidden]
        lm_head_weight: Tensor,  # [vocab, hidden]
        base_model: str,
        directory: Path,
    ) -> None:
        self.config, self.directory, self.base_model = config, directory, base_model
        self.embedding = embedding
        vocab_size, hidden_size = lm_head_weight.shape
        chosen = token_map(cache, config.vocab, vocab_size)
        self.module = MedusaHeads(
            config.heads, config.layers, hidden_size, vocab_size, chosen, root_input=config.root_input
        )
        weight = lm_head_weight.detach().to(torch.bfloat16)
        self.projection = weight if chosen is None else weight[chosen].contiguous()  # [num_tokens, hidden]

        self.hidden, self.roots, self.origin = cache.hidden, cache.next_tokens, cache.origin
        self.targets = self._as_columns(cache.targets(config.heads), chosen, vocab_size)
        train_rows = cache.rows(~cache.held_out)
        self.rows = train_rows[(self.targets[train_rows] >= 0).any(dim=1)]
        if len(self.rows) < config.batch:
            raise TrainingError(
                f"{len(self.rows)} training positions do not fill one batch of {config.batch}"
            )
        held_out = cache.rows(cache.held_out & cache.greedy)
        self.held_out = held_out[(self.targets[held_out] >= 0).all(dim=1)][:8192]

        self.steps_per_epoch = len(self.rows) // config.batch
        self.num_steps = max(1, round(config.epochs * self.steps_per_epoch))
        self.optimizer = torch.optim.AdamW(
            self.module.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY
        )
        self.step = 0
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int64)
        self._resume()

    @staticmethod
    def _as_columns(tokens: Tensor, chosen: Tensor | None, vocab_size: int) -> Tensor:
        """Token ids as columns of the projection, -1 where it has none."""
        if chosen is None:
            return tokens
        column = torch.full((vocab_size + 1,), -1, dtype=torch.int64)  # the last one is for token -1
        column[chosen] = torch.arange(len(chosen))
        return column[tokens]

    def _settings(self) -> dict[str, Any]:
        return {**asdict(self.config), "data": self.origin, "base_model": self.base_model}

    def _resume(self) -> None:
        path = self.directory / STATE_FILE
        if not path.exists():
            return
        state = torch.load(path, weights_only=True)
        if json.loads(state["settings"]) != self._settings():
            raise TrainingError(
                f"{path} belongs to a run with other settings, data or weights; choose another --out"
            )
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        log = self.directory / LOG_FILE
        rows = log.read_text().splitlines(True) if log.exists() else [self._log_header()]
        log.write_text("".join(row for row in rows if not row[:1].isdigit() or self._is_past(row)))
        print(f"taken up at step {self.step} of {self.num_steps}", flush=True)

    def _is_past(self, row: str) -> bool:
        return int(row.split(",")[0]) <= self.step

    def save(self) -> None:
        """Write the head set and the trainer's state, each file whole or not at all."""
        save_heads(self.directory, self.module, self.base_model, self.embedding)
        state = {
            "step": self.step,
            "settings": json.dumps(self._settings()),
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        partial = self.directory / f"{STATE_FILE}.partial"
        torch.save(state, partial)
        os.replace(partial, self.directory / STATE_FILE)

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then a cosine down to zero."""
        c = self.config
        if step < c.warmup:
            return c.lr * (step + 1) / c.warmup
        share = (step - c.warmup) / max(1, self.num_steps - c.warmup)
        return c.lr * 0.5 * (1 + math.cos(math.pi * share))

    def _batch(self, step: int) -> Tensor:
        """Row numbers of this step's positions, [batch], ascending so that reading from disk is quick."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.config.seed * 100_003 + epoch)
            self._order = torch.randperm(len(self.rows), generator=generator)
            self._epoch = epoch
        size = self.config.batch
        return self.rows[self._order[place * size : (place + 1) * size]].sort().values

    def _features(self, rows: Tensor) -> Tensor:
        """[num_heads, num_rows, hidden] in bfloat16, the format heads are served in; weights stay float32."""
        hidden, roots = self.hidden[rows], self.embedding[self.roots[rows]].to(torch.bfloat16)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.module.features(hidden, self.config.heads, roots).to(torch.bfloat16)

    def losses(self, rows: Tensor) -> list[Tensor]:
        """Mean cross-entropy per head over the given rows that have a target, rows: [num_rows]."""
        targets = self.targets[rows]
        features = self._features(rows)
        means = []
        for head in range(self.config.heads):
            known = targets[:, head] >= 0
            total = vocabulary_loss(features[head][known], self.projection, targets[known, head])
            means.append(total / known.sum().clamp_min(1))
        return means

    def train_step(self) -> list[float]:
        """One step; the loss per head. Raises TrainingError where it is not finite, before any update."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.step)
        losses = self.losses(self._batch(self.step))
        total = torch.stack([HEAD_DECAY**k * loss for k, loss in enumerate(losses)]).sum()
        if not total.isfinite():
            raise TrainingError(
                f"the loss is {total.item()} at step {self.step}; the last good checkpoint is in "
                f"{self.directory}: lower --lr and start anew, or use it as it is"
            )
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]
        self._clip_gradients()
        self.optimizer.step()
        self.step += 1
        return [loss.item() for loss in losses]

    @torch.no_grad()
    def _clip_gradients(self) -> None:
        """Each head's gradient to a norm of at most 1: by head, so that heads never influence each other."""
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        norms = torch.stack([g.flatten(1).square().sum(dim=1) for g in gradients]).sum(dim=0).sqrt()
        factors = (1 / norms.clamp_min(1e-12)).clamp_max(1)  # [num_heads]
        for gradient in gradients:
            gradient.mul_(factors.view(-1, *[1] * (gradient.ndim - 1)))

    @torch.no_grad()
    def held_out_hits(self) -> list[float]:
        """Top-1 hit rate per head over a sample of the held-out greedy text."""
        right = torch.zeros(self.config.heads)
        for begin in range(0, len(self.held_out), 1024):
            rows = self.held_out[begin : begin + 1024]
            features = self._features(rows)
            for head in range(self.config.heads):
                guesses = (features[head] @ self.projection.t()).argmax(dim=1)
                right[head] += (guesses == self.targets[rows, head]).sum()
        return (right / max(1, len(self.held_out))).tolist()

    def run(self) -> None:
        """Train to the end from wherever this run is, and leave the head set in the directory."""
        self.directory.mkdir(parents=True, exist_ok=True)
        if self.step == 0:
            (self.directory / LOG_FILE).write_text(self._log_header())
        began, first = time.monotonic(), self.step
        recent: list[list[float]] = []
        while self.step < self.num_steps:
            recent.append(self.train_step())
            if self.step % self.config.checkpoint_every and self.step != self.num_steps:
                continue
            losses = [sum(column) / len(recent) for column in zip(*recent, strict=True)]
            recent.clear()
            self.save()
            seconds = time.monotonic() - began
            self._log(losses, self.held_out_hits(), seconds, seconds / (self.step - first))

    def _log_header(self) -> str:
        numbers = [f"{name}_{k}" for name in ("loss", "top1") for k in range(self.config.heads)]
        return ",".join(["step", "lr", "seconds", *numbers]) + "\n"

    def _log(self, losses: list[float], hits: list[float], seconds: float, per_step: float) -> None:
        lr = self.learning_rate(self.step - 1)
        with (self.directory / LOG_FILE).open("a", newline="") as file:
            numbers = [f"{x:.4f}" for x in (*losses, *hits)]
            csv.writer(file).writerow([self.step, f"{lr:.2e}", f"{seconds:.0f}", *numbers])
        print(
            f"step {self.step}/{self.num_steps}  loss {' '.join(f'{x:.3f}' for x in losses)}  "
            f"held-out top-1 {' '.join(f'{100 * x:.1f}%' for x in hits)}  "
            f"{self.config.batch / per_step:.0f} positions/s, "
            f"{(self.num_steps - self.step) * per_step / 60:.1f} min left",
            flush=True,
        )
