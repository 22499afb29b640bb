"""The paged KV cache's tensors: written by attention, rearranged by compaction. Who owns a block is not its
business (see `engine.scheduling.block_pool`)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from engine.model.config import DecoderConfig
from engine.native.attention import reads_cache
from engine.triton import support


def bytes_per_token(config: DecoderConfig, dtype: torch.dtype, extra_layers: int = 0) -> int:
    return 2 * (config.num_layers + extra_layers) * config.num_kv_heads * config.head_dim * dtype.itemsize


class KVCache:
    """K and V of all layers, each [num_layers, num_kv_heads, num_blocks * block_size, head_dim].

    What one head reads of a run of blocks is one run of memory. A *slot* is a row of the third dimension.
    `extra_layers` come after the model's own: a drafter's.
    """

    def __init__(
        self,
        config: DecoderConfig,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        extra_layers: int = 0,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_layers = config.num_layers + extra_layers
        shape = (self.num_layers, config.num_kv_heads, num_blocks * block_size, config.head_dim)
        self.k = _zeros(shape, dtype, device)
        self.v = _zeros(shape, dtype, device)
        self.has_kernels = reads_cache(self.k)
        self.has_triton = support.reads_cache(self.k)

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """slots: [num_tokens] int64; k, v: [num_tokens, num_kv_heads, head_dim]."""
        self.k[layer].index_copy_(1, slots, k.transpose(0, 1))
        self.v[layer].index_copy_(1, slots, v.transpose(0, 1))

    def read(self, layer: int, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """K and V of block tables, each [num_tables, num_kv_heads, blocks_per_table * block_size, head_dim].

        blocks: [num_tables, blocks_per_table] int64.
        """
        tables, length = blocks.shape[0], blocks.shape[1] * self.block_size
        k, v = (
            cache[layer]
            .view(cache.shape[1], self.num_blocks, -1)
            .index_select(1, blocks.view(-1))
            .view(cache.shape[1], tables, length, cache.shape[3])
            .transpose(0, 1)
            for cache in (self.k, self.v)
        )
        return k, v

    def read_run(self, layer: int, first_block: int, num_blocks: int) -> tuple[Tensor, Tensor]:
        """The same for one table of consecutive blocks, as views: nothing is copied."""
        run = slice(first_block * self.block_size, (first_block + num_blocks) * self.block_size)
        return self.k[layer, :, run].unsqueeze(0), self.v[layer, :, run].unsqueeze(0)

    def move(self, sources: Tensor, destinations: Tensor) -> None:
        """Compaction, in all layers: slot sources[i, j] of request i moves to destinations[i, j].

        Both are [num_requests, num_moves] int64; where they are equal nothing moves. All sources of a request
        are read before anything is written: a destination may be another of its moves' source.
        """
        if self.has_triton:
            from engine.triton.cache import compact

            compact(self.k, self.v, sources, destinations)
            return
        moves = sources != destinations
        sources, destinations = sources[moves], destinations[moves]
        if sources.numel():
            self.k[:, :, destinations] = self.k[:, :, sources]
            self.v[:, :, destinations] = self.v[:, :, sources]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    # Attention masks unwritten slots, but 0 times NaN is NaN, so the memory has to start as zeros. On CPU the
    # operating system's own zero pages do, and take no memory until they are written.
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    unsigned = {2: np.uint16, 4: np.uint32}[dtype.itemsize]
    return torch.from_numpy(np.zeros(shape, dtype=unsigned)).view(dtype)
