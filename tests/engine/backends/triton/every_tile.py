"""Run as a program, with a GPU's capability as its argument: compiles the attention kernel in every tile that
may be chosen, and compaction for every row of a cache. Prints one line of JSON for each. No GPU is needed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import torch
from triton.runtime import driver

from engine.backends.triton.plan import AttentionPlan, Capacity
from engine.backends.triton.tiles import PagedHeads, query_counts
from tests.engine.backends.triton.cases import TritonAttention, compact
from tests.engine.backends.triton.hopper import Driver, Launches, cache_of, compiling, usage
from tests.engine.tiny import CPU

F32, BF16, FP8 = torch.float32, torch.bfloat16, torch.float8_e4m3fn  # float16 compiles as bfloat16 does
# Of queries and of the cache. float32 over float8 has the tiles of float32, and is known to spill.
FORMATS = [(BF16, BF16), (F32, F32), (BF16, FP8)]
GROUPS = [(3, head_dim) for head_dim in (32, 64, 96, 128, 256)] + [(71, 64), (48, 128)]
FP8_SINCE = 89


def choices(capability: int) -> Iterator[tuple[torch.dtype, torch.dtype, int, int]]:
    """Queries' and cache's number formats, query heads per KV head, head size."""
    for dtype, stored in FORMATS:
        if stored != FP8 or capability >= FP8_SINCE:
            for group, head_dim in GROUPS:
                yield dtype, stored, group, head_dim


def compile_tiles(dtype: torch.dtype, stored: torch.dtype, group: int, head_dim: int) -> None:
    cache = cache_of((group, 1, head_dim), dtype, stored, 2)
    heads = PagedHeads.of(cache, group)
    about = {"dtype": str(dtype), "stored": str(stored), "group": group, "head_dim": head_dim}
    slots = torch.full((1,), -1)
    for max_queries in query_counts(heads):
        plan = AttentionPlan.reserve(Capacity(1, 1, max_queries, 1), heads, CPU)
        attention = TritonAttention(plan, cache, slots, torch.zeros_like(slots))
        q, k = torch.zeros(1, group, head_dim, dtype=dtype), torch.zeros(1, 1, head_dim, dtype=dtype)
        with compiling() as launched:
            attention(0, q, k, k)
        tile = {"rows": plan.tile.rows, "keys": plan.tile.keys, "warps": plan.tile.num_warps}
        tell({**about, **tile}, launched)
    with compiling() as launched:
        compact(cache.k, cache.v, slots.view(1, 1), slots.view(1, 1))
    tell(about, launched)


def tell(about: dict[str, object], launched: Launches) -> None:
    for name, kernel in launched:
        found = {"kernel": name, "shared": kernel.metadata.shared, **usage(kernel)}
        print(json.dumps({**about, **found}), flush=True)


if __name__ == "__main__":
    driver.set_active(Driver(int(sys.argv[1])))
    for choice in choices(int(sys.argv[1])):
        compile_tiles(*choice)
