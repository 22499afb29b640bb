"""The visibility rule, which every attention keeps: who sees what of its request's keys.

Key k of a request is visible to a query iff `k < prefix_len`, or `k - prefix_len < 64` and that bit of
`ancestors` is set. Prompts and trees differ only in these two numbers, so one pass serves both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trees.family import MAX_DRAFT_NODES


def visibility(prefix_len: Tensor, ancestors: Tensor, num_keys: int) -> Tensor:
    """The rule itself: [..., num_queries, num_keys] bool from two [..., num_queries] int64 tensors."""
    keys = torch.arange(num_keys, device=prefix_len.device)
    beyond = keys - prefix_len.unsqueeze(-1)
    in_tree = (ancestors.unsqueeze(-1) >> beyond.clamp(0, MAX_DRAFT_NODES)) & 1
    return (beyond < 0) | ((beyond <= MAX_DRAFT_NODES) & (in_tree == 1))
