"""The noise of draws by our own kernels: `engine.runner.noise` is what they compute, up to rounding."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.native.library import kernels


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
        torch.get_num_threads(),
    )
    return out
