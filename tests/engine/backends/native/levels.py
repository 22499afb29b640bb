"""Hydra heads by the kernels one level at a time, as `heads.base.DraftHeads` is asked, to compare with."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from engine.backends.native.hydra import NativeHydra
from engine.backends.native.scratch import scratch
from engine.backends.threads import num_threads

EPS = torch.finfo(torch.float32).eps


def begin(hidden: Tensor) -> Tensor:
    """hidden: [num_requests, hidden] -> the state before the first head"""
    return hidden.float().unsqueeze(1)


def guess(
    native: NativeHydra,
    head: int,
    state: Tensor,
    tokens: Tensor,
    origins: Tensor,
    num_guesses: int,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Guesses, log-probabilities and the next state, as `DraftHeads.guess` has them."""
    requests, paths = tokens.shape
    hidden, num_tokens = native._embedding.shape[1], native._projection.out_features
    tokens, state = tokens.contiguous(), state.contiguous()
    owners = torch.arange(requests).repeat_interleave(paths)
    rows = origins + (torch.arange(requests) * state.shape[1]).unsqueeze(1)
    features = torch.empty(requests, paths, hidden)
    guesses = torch.empty(requests, paths, num_guesses, dtype=torch.int64)
    log_probs = torch.empty(requests, paths, num_guesses)
    threads = num_threads()
    needed = native._library.gorgon_hydra_bytes(hidden, num_tokens, tokens.numel(), threads)
    native._library.gorgon_hydra(
        ctypes.byref(native._mixes[head].c),
        ctypes.byref(native._projection.c),
        native._embedding.data_ptr(),
        EPS,
        tokens.data_ptr(),
        state.data_ptr(),
        rows.data_ptr(),
        tokens.numel(),
        features.data_ptr(),
        None if noise is None else noise.data_ptr(),
        owners.data_ptr(),
        num_guesses,
        None if native._token_map is None else native._token_map.data_ptr(),
        guesses.data_ptr(),
        log_probs.data_ptr(),
        threads,
        scratch.pointer(needed),
    )
    return guesses, log_probs, features
