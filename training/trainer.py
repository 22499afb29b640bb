"""Heads learn on the cached hidden rows of a frozen backbone, whatever their architecture (Medusa-1).

The loss is the sum over heads k of 0.8^k times the mean cross-entropy of head k (arXiv 2401.10774, section
2.2), over the positions whose target lies in the token map. The target is the token the text has, or the
base's whole distribution at that place, which says more about every position (the teacher loss of Hydra++,
arXiv 2402.05109, section 4.2). The text of step s is a function of (seed, s) alone, so that a run that was
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
from typing import Any, Literal

import torch
from torch import Tensor

from engine.errors import GorgonError
from heads.base import DraftHeads
from heads.checkpoint import save_heads
from training.hidden_states import HiddenCache
from training.sequences import SequenceBatch, Sequences
from training.vocabulary_loss import distributions, vocabulary_loss

HEAD_DECAY = 0.8  # weight of head k in the loss: 0.8^k
LARGEST_GRADIENT = 1.0
STATE_FILE = "trainer.pt"
LOG_FILE = "log.csv"
HELD_OUT_DOCUMENTS = 60


class TrainingError(GorgonError):
    """A run that cannot go on; the message says from where it can be taken up."""


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """How heads are trained. `batch` counts tokens of conversations in a step, prompts and padding included;
    `targets` are the text's tokens (hard) or the base's distributions (soft)."""

    targets: Literal["hard", "soft"] = "soft"
    epochs: float = 2.0
    batch: int = 1536
    lr: float = 1.5e-3
    warmup: int = 100
    weight_decay: float = 0.05
    seed: int = 0
    checkpoint_every: int = 200


def token_map(cache: HiddenCache, size: int, vocab_size: int) -> Tensor | None:
    """The `size` tokens most frequent in the training answers, ascending; None for the whole vocabulary."""
    if size >= vocab_size:
        return None
    held_out = torch.repeat_interleave(cache.held_out, cache.documents[:, 1] - cache.documents[:, 0])
    counts = torch.bincount(cache.token_ids[cache.is_answer & ~held_out], minlength=vocab_size)
    return counts.argsort(descending=True, stable=True)[:size].sort().values


class HeadsTrainer:
    """One run in one directory, which holds the trainer's state, a log and the head set as last saved."""

    def __init__(
        self,
        config: TrainerConfig,
        heads: DraftHeads,
        cache: HiddenCache,
        embedding: Tensor,  # [vocab, hidden]
        lm_head_weight: Tensor,  # [vocab, hidden]
        base_model: str,
        directory: Path,
    ) -> None:
        self.config, self.heads, self.directory, self.base_model = config, heads, directory, base_model
        self.embedding = embedding.detach().to(torch.bfloat16)
        weight = lm_head_weight.detach().to(torch.bfloat16)
        self.projection = heads.mapped(weight)  # [num_tokens, hidden], the base's
        self._columns = _columns(heads.token_map, len(weight))
        self.origin = cache.origin
        self.sequences = Sequences(cache)
        training = torch.nonzero(~cache.held_out).squeeze(1)
        if not len(training):
            raise TrainingError("no conversation is left to train on once some are held out; give more data")
        self.plan = self.sequences.plan(training, config.batch, config.epochs, config.seed)
        # What is served most is greedy; sampled text is measured only where there is nothing else.
        greedy = cache.held_out & cache.greedy
        measured = greedy if bool(greedy.any()) else cache.held_out
        self.held_out = torch.nonzero(measured).squeeze(1)[:HELD_OUT_DOCUMENTS].tolist()
        self.optimizer = torch.optim.AdamW(
            heads.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=config.weight_decay
        )
        self.step = 0
        self._resume()

    @property
    def num_steps(self) -> int:
        return len(self.plan)

    def _settings(self) -> dict[str, Any]:
        return {
            **asdict(self.config),
            "heads": {name: list(t.shape) for name, t in self.heads.state_dict().items()},
            "data": self.origin,
            "base_model": self.base_model,
        }

    def _resume(self) -> None:
        path = self.directory / STATE_FILE
        if not path.exists():
            return
        state = torch.load(path, weights_only=True)
        if json.loads(state["settings"]) != self._settings():
            raise TrainingError(
                f"{path} belongs to a run with other settings, data or weights; choose another --out"
            )
        self.heads.load_state_dict(state["heads"])
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
        save_heads(self.directory, self.heads, self.base_model, self.embedding)
        state = {
            "step": self.step,
            "settings": json.dumps(self._settings()),
            "heads": self.heads.state_dict(),
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

    def features(self, batch: SequenceBatch) -> list[Tensor]:
        """What each head projects, [num_anchors, hidden] each: in bfloat16, the format heads are served in;
        weights stay float32."""
        with torch.autocast("cpu", torch.bfloat16):
            features = self.heads.sequence_features(
                batch.hidden, self.embedding[batch.token_ids], batch.anchors
            )
        return [f.to(torch.bfloat16) for f in features]

    def _projected(self, head: int, features: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and weight of a head's logits, both in bfloat16."""
        with torch.autocast("cpu", torch.bfloat16):
            rows, weight = self.heads.projected(head, features)
        return rows, self.projection if weight is None else weight.to(torch.bfloat16)

    def losses(self, batch: SequenceBatch) -> list[Tensor]:
        """Mean cross-entropy of each head over the anchors that have a target."""
        teacher = None
        if self.config.targets == "soft":
            teacher = distributions(batch.hidden.flatten(0, 1), self.projection)
        means = []
        for head, features in enumerate(self.features(batch)):
            columns = self._columns[batch.targets(head)]
            known = columns >= 0
            # The row of token t + 1 + k says what the base makes of token t + 2 + k.
            wanted = columns[known] if teacher is None else batch.anchors[known] + 1 + head
            rows, weight = self._projected(head, features[known])
            total = vocabulary_loss(rows, weight, wanted, teacher)
            means.append(total / known.sum().clamp_min(1))
        return means

    def train_step(self) -> list[float]:
        """One step; the loss per head. Raises TrainingError where it is not finite, before any update."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.step)
        losses = self.losses(self.sequences.load(self.plan[self.step]))
        total = torch.stack([HEAD_DECAY**k * loss for k, loss in enumerate(losses)]).sum()
        if not total.isfinite():
            raise TrainingError(
                f"the loss is {total.item()} at step {self.step}; the last good checkpoint is in "
                f"{self.directory}: lower --lr and start anew, or use it as it is"
            )
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.heads.parameters(), LARGEST_GRADIENT)
        self.optimizer.step()
        self.step += 1
        return [loss.item() for loss in losses]

    @torch.no_grad()
    def held_out_hits(self) -> list[float]:
        """Top-1 hit rate per head, given the path, over a sample of the held-out text."""
        right, total = torch.zeros(self.heads.num_heads), torch.zeros(self.heads.num_heads)
        for documents in self.sequences.batches(self.held_out, self.config.batch):
            batch = self.sequences.load(documents)
            for head, features in enumerate(self.features(batch)):
                targets = batch.targets(head)
                rows, weight = self._projected(head, features)
                guesses = (rows @ weight.t()).argmax(dim=1)
                right[head] += (guesses == self._columns[targets])[targets >= 0].sum()
                total[head] += (targets >= 0).sum()
        return (right / total.clamp_min(1)).tolist()

    def run(self) -> None:
        """Train to the end from wherever this run is, and leave the head set in the directory."""
        self.directory.mkdir(parents=True, exist_ok=True)
        if self.step == 0:
            (self.directory / LOG_FILE).write_text(self._log_header())
        began, tokens = time.monotonic(), 0
        first = self.step
        recent: list[list[float]] = []
        while self.step < self.num_steps:
            tokens += self._num_tokens(self.step)
            recent.append(self.train_step())
            if self.step % self.config.checkpoint_every and self.step != self.num_steps:
                continue
            losses = [sum(column) / len(recent) for column in zip(*recent, strict=True)]
            recent.clear()
            self.save()
            self._log(losses, self.held_out_hits(), time.monotonic() - began, tokens, first)

    def _num_tokens(self, step: int) -> int:
        return sum(self.sequences.lengths[number] for number in self.plan[step])

    def _log_header(self) -> str:
        numbers = [f"{name}_{k}" for name in ("loss", "top1") for k in range(self.heads.num_heads)]
        return ",".join(["step", "lr", "seconds", *numbers]) + "\n"

    def _log(self, losses: list[float], hits: list[float], seconds: float, tokens: int, first: int) -> None:
        lr = self.learning_rate(self.step - 1)
        with (self.directory / LOG_FILE).open("a", newline="") as file:
            numbers = [f"{x:.4f}" for x in (*losses, *hits)]
            csv.writer(file).writerow([self.step, f"{lr:.2e}", f"{seconds:.0f}", *numbers])
        left = (self.num_steps - self.step) * seconds / (self.step - first)
        print(
            f"step {self.step}/{self.num_steps}  loss {' '.join(f'{x:.3f}' for x in losses)}  "
            f"held-out top-1 {' '.join(f'{100 * x:.1f}%' for x in hits)}  "
            f"{tokens / seconds:.0f} tokens/s, {left / 60:.1f} min left",
            flush=True,
        )


def _columns(chosen: Tensor | None, vocab_size: int) -> Tensor:
    """[vocab + 1] int64: each token's column of the projection, -1 where it has none; the last entry is for
    token -1, which stands for no target."""
    columns = torch.full((vocab_size + 1,), -1, dtype=torch.int64)
    tokens = torch.arange(vocab_size) if chosen is None else chosen
    columns[tokens] = torch.arange(len(tokens))
    return columns
