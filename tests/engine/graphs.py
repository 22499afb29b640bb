"""Graphs without a GPU: the same work over the same places, replayed by running it again."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.backends.attention import FixedAttention, MakeAttention
from engine.backends.kv_cache import KVCache
from engine.backends.rows import PassShape, PassSize
from engine.backends.visibility import visibility
from engine.runner.bucket import Bucket
from engine.runner.capture import make_graphs
from engine.runner.graphs import Run
from engine.runner.runner import Runner

MAX_CONTEXT = 144  # positions that a request may have in these tests


class Repeating:
    """What is captured is run again by replaying it. `num_replays` counts each part of a step."""

    def __init__(self) -> None:
        self.num_replays = 0

    def rehearse(self, run: Run) -> None:
        run()

    def record(self, run: Run) -> Run:
        def replay() -> None:
            self.num_replays += 1
            run()

        return replay


class GatheredAttention:
    """Attention of a bucket in plain torch, for every row by itself, over fixed places and shapes."""

    def __init__(self, bucket: PassSize, cache: KVCache, slots: Tensor, ancestors: Tensor) -> None:
        self._cache = cache
        self._slots, self._ancestors = slots, ancestors
        self._num_keys = min(cache.num_blocks * cache.block_size, MAX_CONTEXT)
        self.prefix_len = torch.zeros(bucket.num_tokens, dtype=torch.int64)
        self._keys = torch.zeros(bucket.num_tokens, self._num_keys, dtype=torch.int64)  # slots

    def load(self, step: PassShape) -> None:
        size = self._cache.block_size
        self.prefix_len.zero_()
        self.prefix_len[: len(step.prefix_len)] = torch.from_numpy(step.prefix_len)
        self._keys.zero_()
        for table, start, stop in zip(step.block_tables, step.starts, step.starts[1:], strict=False):
            slots = (np.array(table)[:, None] * size + np.arange(size)).reshape(-1)
            used = slots[: self._num_keys]
            self._keys[start:stop, : len(used)] = torch.from_numpy(used)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self._cache.write_padded(layer, self._slots, k, v)
        flat = self._keys.view(-1)
        k, v = (
            x[layer].index_select(1, flat).unflatten(1, self._keys.shape).transpose(0, 1)
            for x in (self._cache.k, self._cache.v)
        )  # [num_tokens, kv_heads, num_keys, head_dim]
        visible = visibility(self.prefix_len, self._ancestors, self._num_keys)
        out = F.scaled_dot_product_attention(
            q.unsqueeze(2), k, v, attn_mask=visible[:, None, None], enable_gqa=True
        )
        return torch.where(self._slots.unsqueeze(1) < 0, 0.0, out.flatten(1))


def gathered_attention(cache: KVCache) -> MakeAttention:
    def make(bucket: PassSize, num_heads: int, slots: Tensor, ancestors: Tensor) -> FixedAttention:
        attention = GatheredAttention(bucket, cache, slots, ancestors)
        return FixedAttention(attention, attention.load, attention.prefix_len)

    return make


def move_all(cache: KVCache) -> Callable[[Tensor, Tensor], None]:
    """Compaction in one shape, as a graph needs it: what stays is written where it is."""

    def move(sources: Tensor, destinations: Tensor) -> None:
        for x in (cache.k, cache.v):
            x[:, :, destinations] = x[:, :, sources]

    return move


def add_graphs(runner: Runner, buckets: Sequence[Bucket], capture: Repeating | None = None) -> Repeating:
    """Let a runner decode by repeated work. All buckets must fit its cache."""
    capture = capture or Repeating()
    runner.cache.move = move_all(runner.cache)  # type: ignore[method-assign]
    graphs = make_graphs(runner, buckets, gathered_attention(runner.cache), capture)
    assert len(graphs) == len(set(buckets))
    runner.use_graphs(graphs)
    return capture


@contextmanager
def noted_waits() -> Generator[list[str], None, None]:
    """Gives what torch has to say, afterwards, of operators inside that made the host wait for the device."""
    waits: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")  # saying so is itself a matter of a warning: the mode is experimental
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits += [str(w.message) for w in caught if "synchronizing CUDA operation" in str(w.message)]
