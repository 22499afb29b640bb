"""What the tests of the GPU kernels share. The kernels are imported here alone: where there is no Triton, the
module that imports this one is skipped."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.backends.kv_cache import KVCache
from engine.backends.rows import PassInput
from tests.engine.passes import make_pass
from tests.engine.tiny import CPU, tiny_config

if sys.platform == "linux":
    from engine.backends.triton.attention import TritonAttention as TritonAttention
    from engine.backends.triton.attention import warm_up as warm_up
    from engine.backends.triton.backend import TritonBackend as TritonBackend
    from engine.backends.triton.cache import compact as compact
else:
    pytest.skip("Triton is made for Linux only", allow_module_level=True)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass
class Case:
    """A pass with random queries, keys and values over a random cache, on the device; and the same in float32
    on the CPU, for the reference."""

    step: PassInput
    num_heads: int
    num_kv_heads: int
    cache: KVCache
    reference_cache: KVCache
    q: Tensor  # [num_tokens, num_heads, head_dim]
    k: Tensor  # [num_tokens, num_kv_heads, head_dim]
    v: Tensor
    reference_step: PassInput

    @property
    def reference_inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q.cpu().float(), self.k.cpu().float(), self.v.cpu().float()


def make_case(
    lengths: list[tuple[int, int, int]],
    heads: tuple[int, int, int],
    *,
    block_size: int = 16,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    stored: torch.dtype | None = None,
) -> Case:
    """lengths: as in `make_pass`; heads: query heads, KV heads, head size; stored: the cache's dtype."""
    num_heads, num_kv_heads, head_dim = heads
    config = tiny_config(num_layers=1, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim)
    step, num_blocks = make_pass(lengths, block_size, seed)
    cache = KVCache(config, num_blocks, block_size, dtype, DEVICE)
    reference = KVCache(config, num_blocks, block_size, torch.float32, CPU)
    generator = torch.Generator().manual_seed(seed)
    for name in ("k", "v"):
        drawn = torch.randn(reference.k.shape, generator=generator).to(stored or dtype)
        setattr(cache, name, drawn.to(DEVICE))
        getattr(reference, name).copy_(drawn)
    tokens = len(step.slots)
    # A slice of one matrix, as the decoder has it.
    drawn = torch.randn(tokens, num_heads + 2 * num_kv_heads, head_dim, generator=generator).to(dtype)
    q, k, v = drawn.to(DEVICE).split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    return Case(step_on(step, DEVICE), num_heads, num_kv_heads, cache, reference, q, k, v, step)


def step_on(step: PassInput, device: torch.device) -> PassInput:
    names = ("token_ids", "positions", "slots", "ancestors")
    moved: dict[str, Any] = {name: getattr(step, name).to(device) for name in names}
    return replace(step, **moved)
