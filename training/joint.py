"""Medusa-2: the backbone learns together with its heads (Medusa, arXiv 2401.10774, section 2.2.2).

At first the heads learn alone on a frozen backbone, then both learn at rates of their own; the losses are in
`training.joint_losses`. Text and dropout of step s are functions of (seed, s) alone, so that a run that was
killed and continued ends like an unbroken one. Several devices share each step's conversations.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from heads.base import DraftHeads
from training.backbone import Backbone, JointTrainingError
from training.conversations import BatchPlan, ConversationBatch, make_batch
from training.dataset import Document, digest
from training.heads_loss import token_columns
from training.joint_log import JointLog, StepFacts
from training.joint_losses import distillation_loss, head_losses, language_loss, phase_rate, sine_ramp
from training.run_state import HEAD_DECAY, LARGEST_GRADIENT, STATE_FILE, not_finite, tensors_digest

HEADS_LR_FACTOR = 4.0  # heads learn this much faster than the backbone (appendix B)
WEIGHT_DECAY = 0.01
# By L_LM: the highest lambda0, and the backbone's highest learning rate (sections 2.2.2, 2.3.2, appendix B)
LAMBDA0 = {"distill": 0.01, "ce": 0.2}
DEFAULT_LR = {"distill": 1e-4, "ce": 5e-4}
# A run may continue with other values of these.
_CHANGEABLE = ("lr", "heads_first_lr", "accumulate", "checkpoint_every")


@dataclass(frozen=True, kw_only=True)
class JointConfig:
    """How both are trained.

    `batch` counts conversations in a step over all devices; each device takes its share in `accumulate`
    passes. `lr` is the backbone's, None for the default of the loss.
    """

    lm_loss: Literal["distill", "ce"] = "distill"
    full: bool = False
    heads_first_steps: int = 0
    epochs: float = 1.0
    batch: int = 16
    accumulate: int = 4
    lr: float | None = None
    heads_first_lr: float = 2e-3
    warmup: int = 20
    seed: int = 0
    checkpoint_every: int = 50

    @property
    def backbone_lr(self) -> float:
        return DEFAULT_LR[self.lm_loss] if self.lr is None else self.lr


class JointModel(nn.Module):
    """Backbone and heads as one module, so that a device does everything in one forward pass of it."""

    columns: Tensor  # [vocab + 1] int64: a token's column of the projection, -1 for none; the last: token -1

    def __init__(self, backbone: Backbone, heads: DraftHeads, lm_loss: Literal["distill", "ce"]) -> None:
        super().__init__()
        self.backbone, self.heads, self.lm_loss = backbone, heads, lm_loss
        columns = token_columns(heads.token_map, heads.vocab_size)
        self.register_buffer("columns", columns, persistent=False)

    def forward(self, batch: ConversationBatch, joint: bool) -> Tensor:
        """Sums over the batch's rows: L_LM, then each head's cross-entropy, [1 + num_heads] float32. Heads
        learn at the rows before an answer token, their anchors.

        Without `joint` the backbone stands still and its loss is not computed: 0.
        """
        backbone = self.backbone
        with nullcontext() if joint else torch.no_grad():
            states = backbone.hidden(batch.token_ids)
        hidden = states[batch.rows]
        lm_loss = torch.zeros((), device=hidden.device)
        if joint and self.lm_loss == "distill":
            teacher = backbone.teacher_hidden(batch.token_ids)[batch.rows]
            lm_loss = distillation_loss(backbone, hidden, teacher)
        elif joint:
            lm_loss = language_loss(backbone, hidden, batch.next_tokens)
        dtype = next(self.heads.parameters()).dtype
        embeddings = backbone.embedding[batch.token_ids].to(dtype)
        features = self.heads.sequence_features(states.to(dtype).view_as(embeddings), embeddings, batch.rows)
        columns, projection = self.columns[batch.targets], self.heads.mapped(backbone.projection())
        by_head = head_losses(self.heads, features, columns, projection)
        return torch.cat((lm_loss.unsqueeze(0), by_head))


class JointTrainer:
    """One run in one directory, which holds the trainer's state and a log.

    accelerator: accelerate's, which says the device, the number format and which share of a step is ours.
    documents: those to train on; held-out ones among them are left out. start: a digest of the head set that
    the heads come from, None for fresh ones.
    """

    def __init__(
        self,
        config: JointConfig,
        documents: list[Document],
        backbone: Backbone,
        heads: DraftHeads,
        directory: Path,
        accelerator: Any,
        start: str | None = None,
    ) -> None:
        self.config, self.directory, self.accelerator = config, directory, accelerator
        self.num_heads = heads.num_heads
        training = [d for d in documents if not d.held_out and d.num_answer_tokens]
        self.num_passes = config.accumulate * accelerator.num_processes
        if config.batch % self.num_passes:
            raise JointTrainingError(
                f"--batch {config.batch} cannot be shared by {accelerator.num_processes} devices in "
                f"{config.accumulate} passes each; make it a multiple of {self.num_passes}"
            )
        if len(training) < config.batch:
            raise JointTrainingError(
                f"{len(training)} training conversations do not fill one batch of {config.batch}"
            )
        self.plan = BatchPlan(training, config.batch, config.seed)
        self.num_joint_steps = max(1, round(config.epochs * self.plan.steps_per_epoch))
        self.num_steps = config.heads_first_steps + self.num_joint_steps
        self._origin = {
            **{k: v for k, v in asdict(config).items() if k not in _CHANGEABLE},
            "data": digest(training),
            "model": hashlib.sha256(backbone.embedding.float().cpu().numpy().tobytes()).hexdigest(),
            "heads": {name: list(t.shape) for name, t in heads.state_dict().items()},
            "token_map": tensors_digest({"token_map": heads.token_map}),
            "start": start,
        }
        self.joint = JointModel(backbone, heads, config.lm_loss)
        self.groups = [list(backbone.trained().values()), list(heads.parameters())]
        optimizer = torch.optim.AdamW(
            [{"params": parameters} for parameters in self.groups],
            lr=config.backbone_lr,
            betas=(0.9, 0.95),
            weight_decay=WEIGHT_DECAY,
        )
        self.step = 0
        self.log = JointLog(directory, self.num_heads, self.num_steps, accelerator.is_main_process)
        self._prepared, self.optimizer = accelerator.prepare(self.joint, optimizer)
        self._resume()

    @property
    def is_joint(self) -> bool:
        """Whether the next step trains both, because the heads' warm-up is over."""
        return self.step >= self.config.heads_first_steps

    def _trained(self) -> dict[str, nn.Parameter]:
        parameters = {f"backbone.{name}": p for name, p in self.joint.backbone.trained().items()}
        return parameters | {f"heads.{name}": p for name, p in self.joint.heads.named_parameters()}

    def _resume(self) -> None:
        path = self.directory / STATE_FILE
        if not path.exists():
            return
        state = torch.load(path, weights_only=True, map_location="cpu")
        if json.loads(state["origin"]) != self._origin:
            raise JointTrainingError(
                f"{path} belongs to a run with other settings, data or weights; choose another --out"
            )
        with torch.no_grad():
            for name, parameter in self._trained().items():
                parameter.copy_(state["parameters"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        self.log.curves.cut(self.step)
        self.accelerator.print(f"taken up at step {self.step} of {self.num_steps}", flush=True)

    def save(self) -> None:
        """Write the state, whole or not at all: adapters or weights, heads, optimizer, step. Learning rates
        and random numbers follow from the step."""
        if not self.accelerator.is_main_process:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        state = {
            "step": self.step,
            "origin": json.dumps(self._origin),
            "parameters": {name: p.detach() for name, p in self._trained().items()},
            "optimizer": self.optimizer.state_dict(),
        }
        partial = self.directory / f"{STATE_FILE}.partial"
        torch.save(state, partial)
        os.replace(partial, self.directory / STATE_FILE)

    def learning_rates(self, step: int) -> tuple[float, float]:
        """The backbone's and the heads' learning rates at a step. Each phase has its own warm-up and
        cosine."""
        c = self.config
        if step < c.heads_first_steps:
            return 0.0, c.heads_first_lr * phase_rate(step, c.heads_first_steps, c.warmup)
        share = phase_rate(step - c.heads_first_steps, self.num_joint_steps, c.warmup)
        return c.backbone_lr * share, HEADS_LR_FACTOR * c.backbone_lr * share

    def lambda0(self, step: int) -> float:
        """Weight of the heads' losses: 1 while they train alone, then lambda0 of the configured L_LM.

        For distillation it rises slowly, because that L_LM starts at 0.
        """
        c = self.config
        if step < c.heads_first_steps:
            return 1.0
        ramp = sine_ramp(step - c.heads_first_steps, self.num_joint_steps) if c.lm_loss == "distill" else 1.0
        return LAMBDA0[c.lm_loss] * ramp

    def train_step(self) -> StepFacts:
        """One step. Raises JointTrainingError where loss or gradient is not finite, before any update."""
        accelerator, joint, lambda0 = self.accelerator, self.is_joint, self.lambda0(self.step)
        rates = self.learning_rates(self.step)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        rank, world = accelerator.process_index, accelerator.num_processes
        torch.manual_seed((self.config.seed * 1_000_003 + self.step) * 1_000 + rank)  # dropout
        batches = [
            make_batch(documents, self.num_heads) for documents in self.plan.step(self.step, self.num_passes)
        ]
        counts = torch.stack([_counts(batch, self.joint.columns.cpu()) for batch in batches]).sum(dim=0)
        counts.clamp_(min=1)
        weights = torch.tensor([float(joint), *(lambda0 * HEAD_DECAY**k for k in range(self.num_heads))])
        # Every position of the step has the same weight, in whichever pass and on whichever device. Gradients
        # are averaged over devices, hence the factor.
        scale = (world * weights / counts).to(accelerator.device)
        sums = torch.zeros(1 + self.num_heads, device=accelerator.device)
        ours = batches[rank::world]
        self._prepared.train()
        for number, batch in enumerate(ours, start=1):
            waits = number < len(ours)
            with accelerator.no_sync(self._prepared) if waits else nullcontext():
                losses = self._prepared(batch.to(accelerator.device), joint)
                accelerator.backward((losses * scale).sum())
            sums += losses.detach()
        means = (accelerator.reduce(sums).cpu() / counts).tolist()
        norms = [nn.utils.clip_grad_norm_(group, LARGEST_GRADIENT) for group in self.groups]
        if not all(math.isfinite(x) for x in (*means, *map(float, norms))):
            raise JointTrainingError(not_finite(self.directory, self.step, means))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        tokens = sum(batch.token_ids.numel() for batch in batches)
        return StepFacts(means[0], means[1:], *rates, lambda0, tokens)

    def run(self) -> None:
        """Train from the current state to the end."""
        self.log.curves.start(self.step)
        while self.step < self.num_steps:
            began = time.monotonic()
            facts = self.train_step()
            self.log.add(self.step, facts, time.monotonic() - began)
            if self.step % self.config.checkpoint_every == 0 or self.step == self.num_steps:
                self.save()


def _counts(batch: ConversationBatch, columns: Tensor) -> Tensor:
    """How many rows each sum of a batch covers, [1 + num_heads]."""
    known = columns[batch.targets] >= 0
    return torch.cat((torch.tensor([len(batch.rows)]), known.sum(dim=0)))
