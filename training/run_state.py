"""What both trainers share: a few constants, the state's file and its digest, advice where training fails."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

HEAD_DECAY = 0.8  # weight of head k in the loss: 0.8^k
LARGEST_GRADIENT = 1.0
STATE_FILE = "trainer.pt"


def tensors_digest(tensors: Mapping[str, Tensor | None]) -> str:
    """SHA-256 of names, shapes, formats and values, on any device.

    Values count because two head sets or token maps may have the same shapes.
    """
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(name.encode())
        if tensor is not None:
            values = tensor.detach().cpu().contiguous()
            total.update(f"{tuple(values.shape)} {values.dtype}".encode())
            total.update(values.view(torch.uint8).numpy().data)
    return total.hexdigest()


def not_finite(directory: Path, step: int, means: Sequence[float]) -> str:
    """What to tell and advise where a loss or a gradient is no number. means: of the losses."""
    path = directory / STATE_FILE
    where = f"the last good checkpoint is {path}: run again with a lower --lr, it goes on from there"
    start = "there is no checkpoint yet: start again with a lower --lr"
    losses = " ".join(f"{x:.3g}" for x in means)
    advice = where if path.exists() else start
    return f"loss or gradient is not finite at step {step} (losses {losses}); {advice}"
