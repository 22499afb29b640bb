"""The passes whose attention `gorgon bench gpu` compares: plain decoding, trees, trees beside a prompt."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from bench.gpu_options import GpuBenchOptions
from engine.backends.kv_cache import KVCache
from engine.backends.rows import PassInput
from engine.batch import RequestState, make_block_table
from engine.messages import SamplingParams
from engine.runner.step_input import build_rows
from trees.family import TreeFamily

_CHUNK = 256  # tokens of the prompt that stands beside trees
_WRITTEN_AT_ONCE = 1 << 14  # slots, when the cache is filled


@dataclass(frozen=True)
class Case:
    """Requests of one context, each with a tree, whose root is the context's last token. With a chunk the
    last of them is a prompt instead, as long as the others with their trees: its last tokens are in the pass.
    """

    requests: int
    context: int
    nodes: int  # root included; 1 is plain decoding
    chunk: int = 0

    @property
    def name(self) -> str:
        decoding = "plain" if self.nodes == 1 else f"tree {self.nodes}"
        return f"{decoding}, prompt of {self.chunk}" if self.chunk else decoding

    @property
    def keys(self) -> int:
        """Positions of each request."""
        return self.context - 1 + self.nodes


@dataclass(frozen=True)
class Problem:
    """One pass over the cache of a model."""

    step: PassInput
    cache: KVCache
    num_heads: int
    num_kv_heads: int

    @cached_property
    def lengths(self) -> list[int]:
        """Rows of each request."""
        return [int(length) for length in np.diff(self.step.starts)]

    @cached_property
    def num_blocks(self) -> list[int]:
        """Blocks of each request that hold something."""
        size = self.cache.block_size
        return [-(-int(length) // size) for length in self.step.context_lens]

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def device(self) -> torch.device:
        return self.cache.k.device

    def store(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Keys and values of the pass, by the kernel that the engine has for it, if any."""
        if not self.cache.has_triton:
            self.cache.write(layer, self.step.slots, k, v)
            return
        from engine.backends.triton.cache import store  # imports triton, which not every machine has

        out = torch.empty_like(q).flatten(1)
        store(self.cache.k[layer], self.cache.v[layer], self.step.slots, q, k, v, out)


def cases(options: GpuBenchOptions) -> list[Case]:
    """The smallest and the largest tree for every number of requests and every context; and the largest of
    each beside one prompt."""
    few, most = min(options.nodes), max(options.nodes)
    every = [
        Case(requests, context, nodes)
        for context in options.contexts
        for requests in options.requests
        for nodes in sorted({few, most})
    ]
    context = max(options.contexts)
    return [*every, Case(max(options.requests) + 1, context, most, min(_CHUNK, context))]


def num_blocks(options: GpuBenchOptions, block_size: int) -> int:
    """Of a cache that holds any of the passes."""
    return max(case.requests * -(-case.keys // block_size) for case in cases(options))


def pass_of(case: Case, cache: KVCache, family: TreeFamily) -> PassInput:
    """Blocks lie scattered in the cache, as after hours of serving."""
    blocks_each = -(-case.keys // cache.block_size)
    order = torch.randperm(cache.num_blocks, generator=torch.Generator().manual_seed(0)).tolist()
    requests = [
        RequestState(
            request_id=str(index),
            token_ids=[0] * case.keys,
            num_prompt_tokens=case.keys,
            sampling=SamplingParams(max_tokens=1),
            seed=0,
            block_table=make_block_table(order[index * blocks_each : (index + 1) * blocks_each]),
        )
        for index in range(case.requests)
    ]
    num_trees = case.requests - (1 if case.chunk else 0)
    base = case.context - 1
    firsts = [base] * num_trees + [case.keys - case.chunk] * (case.requests - num_trees)
    step = build_rows(requests, firsts, [case.keys] * case.requests, cache.block_size, cache.k.device)
    prefix_len, ancestors = step.prefix_len.copy(), np.zeros(len(step.prefix_len), dtype=np.int64)
    nodes = slice(0, num_trees * case.nodes)
    prefix_len[nodes] = base
    tree = np.array(family.prefix(case.nodes - 1).ancestors, dtype=np.uint64).view(np.int64)
    ancestors[nodes] = np.tile(tree, num_trees)
    return replace(step, prefix_len=prefix_len, ancestors=torch.from_numpy(ancestors).to(cache.k.device))


def fill(cache: KVCache) -> None:
    """Random keys and values everywhere."""
    layers, heads, slots, head_dim = cache.k.shape
    generator = torch.Generator(cache.k.device).manual_seed(0)
    for layer in range(layers):
        for places in torch.split(torch.arange(slots, device=cache.k.device), _WRITTEN_AT_ONCE):
            shape = (2, len(places), heads, head_dim)
            k, v = torch.randn(shape, generator=generator, device=cache.k.device).to(cache.dtype)
            cache.write(layer, places, k, v)
