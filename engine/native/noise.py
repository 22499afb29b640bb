"""Draws and their noise by our own kernels: `engine.runner.sampling` and `engine.runner.noise` are what they
compute, up to rounding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.native.library import kernels
from engine.native.matrix import LANES
from engine.native.scratch import scratch
from engine.native.threads import num_threads


def gumbel(
    keys: NDArray[np.uint64], scales: NDArray[np.float32], token_ids: Tensor | None, num_tokens: int
) -> Tensor | None:
    """Noise of each key times its scale, [num_keys, num_tokens] float32; None without kernels.

    token_ids: [num_tokens] int64, None for 0 to num_tokens - 1.
    """
    library = kernels()
    if library is None:
        return None
    keys, scales = np.ascontiguousarray(keys), np.ascontiguousarray(scales)
    out = torch.empty(len(keys), num_tokens)
    library.gorgon_noise(
        keys.ctypes.data,
        scales.ctypes.data,
        len(keys),
        None if token_ids is None else token_ids.data_ptr(),
        num_tokens,
        out.data_ptr(),
        num_threads(),
    )
    return out


@dataclass(frozen=True)
class Draws:
    """How each of some rows is drawn from; every field [num_rows]."""

    keys: NDArray[np.uint64]
    temperatures: NDArray[np.float32]
    top_k: NDArray[np.int64]  # 0 is off
    top_p: NDArray[np.float64]
    min_p: NDArray[np.float32]


def draw(parts: Sequence[Tensor], draws: Draws) -> Tensor | None:
    """One token per row, [num_rows] int64; None where the kernels do not do it.

    parts: one after the other all rows, each [some rows, vocab] float32, which are not copied.
    """
    vocab = parts[0].shape[1]
    takes = all(part.device.type == "cpu" and part.dtype == torch.float32 for part in parts)
    if not takes or vocab % LANES or any(part.stride(1) != 1 for part in parts):
        return None
    if (library := kernels()) is None:
        return None
    rows = np.concatenate([part.data_ptr() + 4 * part.stride(0) * np.arange(len(part)) for part in parts])
    tokens = torch.empty(len(rows), dtype=torch.int64)
    threads = num_threads()
    library.gorgon_draw(
        rows.ctypes.data,
        len(rows),
        vocab,
        draws.keys.ctypes.data,
        draws.temperatures.ctypes.data,
        draws.top_k.ctypes.data,
        draws.top_p.ctypes.data,
        draws.min_p.ctypes.data,
        tokens.data_ptr(),
        threads,
        scratch.pointer(library.gorgon_draw_bytes(vocab, threads)),
    )
    return tokens
