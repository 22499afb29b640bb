"""Stand-ins the tests share: the simplest thing that does what the real one promises."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from engine.model.config import DecoderConfig


class DenseCausalAttention:
    """Attention of one sequence in one pass: the flat row is the whole sequence, nothing is kept."""

    def __init__(self, config: DecoderConfig) -> None:
        self.groups = config.num_heads // config.num_kv_heads

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [num_tokens, num_heads, head_dim], k and v [num_tokens, num_kv_heads, head_dim] ->
        [num_tokens, num_heads * head_dim]"""
        k, v = (x.repeat_interleave(self.groups, dim=1) for x in (k, v))
        heads_first = (x.transpose(0, 1) for x in (q, k, v))
        return F.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(0, 1).flatten(1)
