"""Small arrays on their way to the device, which the host never waits for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def to_device(values: NDArray[np.int64 | np.float32 | np.float64], device: torch.device) -> Tensor:
    """The same values there. On CPU they share memory."""
    tensor = torch.from_numpy(values)
    if device.type == "cpu":
        return tensor
    # Pinned, so that the copy is the device's work; torch keeps the memory until it is done.
    return tensor.pin_memory().to(device, non_blocking=True)


def to_host(tensor: Tensor) -> Callable[[], Tensor]:
    """Set off a copy to the host; the call that is returned waits for it."""
    if tensor.device.type != "cuda":
        return lambda: tensor
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    copy.copy_(tensor, non_blocking=True)
    done = torch.cuda.Event()  # type: ignore[no-untyped-call]
    done.record()

    def wait() -> Tensor:
        done.synchronize()
        return copy

    return wait


def integers(values: Sequence[int], device: torch.device) -> Tensor:
    """[len(values)] int64"""
    return to_device(np.array(values, dtype=np.int64), device)


def together(arrays: Mapping[str, NDArray[np.int64]], device: torch.device) -> dict[str, Tensor]:
    """All of them there, in one copy."""
    if device.type == "cpu":
        return {name: torch.from_numpy(values) for name, values in arrays.items()}
    packed = to_device(np.concatenate([values.reshape(-1) for values in arrays.values()]), device)
    parts = torch.split(packed, [values.size for values in arrays.values()])
    return {name: part.view(values.shape) for (name, values), part in zip(arrays.items(), parts, strict=True)}
