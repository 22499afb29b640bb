"""What both trainers share: a few constants, the name of the state's file, a digest of the start."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

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
