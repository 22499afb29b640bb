"""Heads of any kind learn on the cached hidden rows of a frozen backbone (Medusa-1).

The loss is the sum over heads k of 0.8^k times the mean cross-entropy of head k (arXiv 2401.10774, section
2.2), over the positions that it learns at (`training.heads_loss`). The text of step s is a function of (seed,
s) alone, so that a run that was killed and continued ends with the same weights as an unbroken one. A step is
cut into pieces of whole conversations, which the devices share and whose gradients are summed. The number of
pieces affects memory alone.
"""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from engine.errors import GorgonError
from heads.base import DraftHeads
from heads.checkpoint import save_heads
from training.devices import training_dtype
from training.heads_log import EpochCost, HeadsLog
from training.heads_loss import LATER_HEADS_EVERY, HeadsLoss
from training.hidden_states import HiddenCache
from training.optimizer import HeadsOptimizer
from training.run_state import HEAD_DECAY, LARGEST_GRADIENT, STATE_FILE, not_finite, tensors_digest
from training.sequences import SequenceBatch, Sequences

HELD_OUT_DOCUMENTS = 60
# A run may continue with other values of these.
_CHANGEABLE = ("lr", "accumulate", "checkpoint_every")


class TrainingError(GorgonError):
    """A run that cannot continue. The message says from where it can."""


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """How heads are trained.

    `batch` counts tokens of conversations in a step, prompts and padding included, over all devices. Each
    device takes its share in `accumulate` pieces. `targets` are the text's tokens (hard) or the base's
    distributions (soft).
    """

    targets: Literal["hard", "soft"] = "soft"
    epochs: float = 2.0
    batch: int = 4096
    accumulate: int = 1
    lr: float = 2e-3
    warmup: int = 100  # steps, at most a tenth of all
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
    """One run in one directory, which holds the trainer's state, a log and the head set as last saved.

    embedding, lm_head_weight: [vocab, hidden], the base's. accelerator: accelerate's, which says the device
    and which share of a step is ours. start: a digest of the head set that the heads come from, None for
    fresh ones.
    """

    def __init__(
        self,
        config: TrainerConfig,
        heads: DraftHeads,
        cache: HiddenCache,
        embedding: Tensor,
        lm_head_weight: Tensor,
        base_model: str,
        directory: Path,
        accelerator: Any,
        start: str | None = None,
    ) -> None:
        self.start = start
        self.config, self.directory, self.base_model = config, directory, base_model
        self.accelerator, self.device = accelerator, accelerator.device
        self.heads = heads.to(self.device)
        place: dict[str, Any] = {"device": self.device, "dtype": training_dtype(self.device)}
        self.embedding = embedding.detach().to(**place)
        weight = lm_head_weight.detach().to(**place)
        self.loss = HeadsLoss(self.heads, self.embedding, weight, soft=config.targets == "soft")
        self.cache, self.sequences = cache, Sequences(cache)
        training = torch.nonzero(~cache.held_out).squeeze(1)
        if not len(training):
            raise TrainingError("no conversation is left to train on once some are held out; give more data")
        self.plan = self.sequences.plan(training, config.batch, config.epochs, config.seed)
        # Most requests are greedy, so sampled text is measured only where there is nothing else.
        greedy = cache.held_out & cache.greedy
        measured = greedy if bool(greedy.any()) else cache.held_out
        self.held_out = torch.nonzero(measured).squeeze(1)[:HELD_OUT_DOCUMENTS].tolist()
        self.optimizer = HeadsOptimizer(self.heads)
        self.step = 0
        self.log = HeadsLog(directory, heads.num_heads, self.num_steps, accelerator.is_main_process)
        self._resume()

    @property
    def num_steps(self) -> int:
        return len(self.plan)

    def _settings(self) -> dict[str, Any]:
        return {
            **asdict(self.config),
            "optimizer": "muon",
            "later_heads_every": LATER_HEADS_EVERY,
            "heads": {name: list(t.shape) for name, t in self.heads.state_dict().items()},
            "token_map": tensors_digest({"token_map": self.heads.token_map}),
            "start": self.start,
            "data": self.cache.origin,
            "base_model": self.base_model,
        }

    def _resume(self) -> None:
        path = self.directory / STATE_FILE
        if not path.exists():
            return
        state = torch.load(path, weights_only=True, map_location="cpu")
        before, now = json.loads(state["settings"]), self._settings()
        if any(before.get(name) != value for name, value in now.items() if name not in _CHANGEABLE):
            raise TrainingError(
                f"{path} belongs to a run with other settings, data or weights; choose another --out"
            )
        self.heads.load_state_dict(state["heads"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        self.log.curves.cut(self.step)
        self.accelerator.print(f"taken up at step {self.step} of {self.num_steps}", flush=True)

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
        warmup = min(c.warmup, max(1, self.num_steps // 10))
        if step < warmup:
            return c.lr * (step + 1) / warmup
        share = (step - warmup) / max(1, self.num_steps - warmup)
        return c.lr * 0.5 * (1 + math.cos(math.pi * share))

    def _pieces(self) -> list[SequenceBatch]:
        """Our share of the next step, on the CPU; fewer pieces where there are not enough conversations."""
        numbers = self.plan[self.step]
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        total = world * self.config.accumulate
        shares = [numbers[first::total] for first in range(rank, total, world)]
        return [self.sequences.load(share) for share in shares if share]

    def train_step(self) -> list[float]:
        """One step; the loss per head. Raises TrainingError where loss or gradient is not finite, before any
        update."""
        pieces = [piece.to(self.device) for piece in self._pieces()]
        zeros = torch.zeros(self.heads.num_heads, device=self.device)
        # Every position of the step has the same weight, in whichever piece and on whichever device.
        ours = zeros + sum(self.loss.counts(piece, self.step) for piece in pieces)
        counts = self.accelerator.reduce(ours).clamp_(min=1)
        weights = HEAD_DECAY ** torch.arange(self.heads.num_heads, device=self.device) / counts
        sums = zeros.clone()
        self.heads.zero_grad(set_to_none=True)
        for piece in pieces:
            losses = self.loss.sums(piece, self.step)
            (losses * weights).sum().backward()
            sums += losses.detach()
        self._share_gradients()
        means: list[float] = (self.accelerator.reduce(sums) / counts).tolist()
        norm = nn.utils.clip_grad_norm_(self.heads.parameters(), LARGEST_GRADIENT)
        if not all(math.isfinite(x) for x in (*means, float(norm))):
            raise TrainingError(not_finite(self.directory, self.step, means))
        self.optimizer.step(self.learning_rate(self.step))
        self.step += 1
        return means

    def _share_gradients(self) -> None:
        """Add up the devices' gradients, once per step: heads are small."""
        if self.accelerator.num_processes == 1:
            return
        parameters = list(self.heads.parameters())
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        total = self.accelerator.reduce(torch.cat([grad.flatten() for grad in grads]))
        for parameter, grad in zip(parameters, total.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = grad.view_as(parameter)

    def held_out_hits(self) -> list[float]:
        """Top-1 hit rate per head, given the path, over a sample of the held-out text."""
        right, total = (torch.zeros(self.heads.num_heads, device=self.device) for _ in range(2))
        for documents in self.sequences.batches(self.held_out, self.config.batch):
            hits, known = self.loss.hits(self.sequences.load(documents).to(self.device))
            right += hits
            total += known
        return (right / total.clamp_min(1)).tolist()

    def run(self) -> None:
        """Train from the current state to the end, and leave the head set in the directory."""
        self.log.start(self.step)
        while self.step < self.num_steps:
            began, tokens = time.monotonic(), self._num_tokens(self.step)
            losses = self.train_step()
            self.log.add(self.step, losses, tokens, time.monotonic() - began)
            if self.step % self.config.checkpoint_every and self.step != self.num_steps:
                continue
            if self.accelerator.is_main_process:
                self.save()
                self.log.checkpoint(self.step, self.learning_rate(self.step - 1), self.held_out_hits())
        self.accelerator.wait_for_everyone()

    def epoch_cost(self) -> EpochCost | None:
        """The cost of an epoch, measured on the steps of this process, and of its backbone passes.

        None where this process did no step.
        """
        if not self.log.steps:
            return None
        tokens = sum(n for n, out in zip(self.sequences.lengths, self.cache.held_out, strict=True) if not out)
        seconds = self.cache.seconds
        backbone = None if seconds is None else seconds * tokens / len(self.cache.token_ids)
        return EpochCost(self.log.seconds * tokens / self.log.tokens, backbone)

    def _num_tokens(self, step: int) -> int:
        return sum(self.sequences.lengths[number] for number in self.plan[step])
