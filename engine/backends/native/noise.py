"""Draws and their noise by our own kernels: `engine.runner.sampling` and `engine.backends.noise` say what
they compute, up to rounding."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.backends.native.library import kernels
from engine.backends.native.matrix import LANES
from engine.backends.native.scratch import scratch
from engine.backends.threads import num_threads


def gumbel(keys: Tensor, scales: Tensor, token_ids: Tensor | None, num_tokens: int) -> Tensor | None:
    """Noise of each key times its scale, [num_keys, num_tokens] float32; None without kernels.

    keys: [num_keys] int64; scales: [num_keys] float32; token_ids: [num_tokens] int64, None for 0 to
    num_tokens - 1.
    """
    library = kernels()
    if library is None:
        return None
    keys, scales = keys.contiguous(), scales.contiguous()
    out = torch.empty(len(keys), num_tokens)
    library.gorgon_noise(
        keys.data_ptr(),
        scales.data_ptr(),
        len(keys),
        None if token_ids is None else token_ids.data_ptr(),
        num_tokens,
        out.data_ptr(),
        num_threads(),
    )
    return out


@dataclass(frozen=True)
class Draws:
    """How each of some rows is drawn from; every field [num_rows], on the device of the rows."""

    keys: Tensor  # int64, of the noise
    temperatures: Tensor  # float32; 0 is greedy
    top_k: Tensor  # int64; 0 is off
    top_p: Tensor  # float64; 1 is off
    min_p: Tensor  # float32; 0 is off


def draw(logits: Tensor, draws: Draws) -> Tensor | None:
    """One token per row, [num_rows] int64; None where the kernels do not do it.

    logits: [num_rows, vocab] float32; no temperature may be 0.
    """
    vocab = logits.shape[1]
    takes = logits.device.type == "cpu" and logits.dtype == torch.float32 and logits.stride(1) == 1
    if not takes or vocab % LANES or (library := kernels()) is None:
        return None
    rows = logits.data_ptr() + 4 * logits.stride(0) * np.arange(len(logits))
    tokens = torch.empty(len(rows), dtype=torch.int64)
    threads = num_threads()
    fields = (draws.keys, draws.temperatures, draws.top_k, draws.top_p, draws.min_p)
    keys, temperatures, top_k, top_p, min_p = (field.contiguous() for field in fields)
    library.gorgon_draw(
        rows.ctypes.data,
        len(rows),
        vocab,
        keys.data_ptr(),
        temperatures.data_ptr(),
        top_k.data_ptr(),
        top_p.data_ptr(),
        min_p.data_ptr(),
        tokens.data_ptr(),
        threads,
        scratch.pointer(library.gorgon_draw_bytes(vocab, threads)),
    )
    return tokens
