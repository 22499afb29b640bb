"""Draws and their noise by our own kernels: `engine.backends.torch` is what they compute, up to rounding."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from engine.backends.draws import Draws
from engine.backends.native.library import kernels
from engine.backends.native.matrix import LANES
from engine.backends.native.scratch import scratch
from engine.backends.threads import num_threads


def gumbel(keys: Tensor, scales: Tensor, num_tokens: int, token_ids: Tensor | None = None) -> Tensor:
    """See `Backend.gumbel`."""
    library = kernels()
    assert library is not None
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
