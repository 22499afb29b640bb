"""Run as a program: compiles what passes launch for a Hopper GPU, on a machine that may have none.

The interpreter takes what a GPU would not: too large a tile, a type that changes in a loop, a kernel that is
compiled anew for every length. Prints one line of JSON for each kernel that was compiled for a pass.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from engine.backends.kv_cache import KVCache
from engine.backends.triton.plan import AttentionPlan
from engine.backends.triton.tiles import PagedHeads
from tests.engine.backends.triton.cases import TritonAttention, compact, warm_up
from tests.engine.passes import make_pass
from tests.engine.tiny import CONFIG, CPU, tiny_config

LLAMA_8B, SMOLLM2 = (32, 8, 128), (9, 3, 64)  # query heads, KV heads, head size
WIDE = (8, 4, 256)
BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
DECODING = [[(n, 0, 1), (5, 0, 1)] for n in (0, 1, 15, 16, 700, 4096)]
TREES = [[(300, 0, 64), (5, 0, 1)]]
CASES = {
    "decoding": (LLAMA_8B, BF16, BF16, DECODING),
    "trees": (LLAMA_8B, BF16, BF16, TREES),
    "float8": (LLAMA_8B, BF16, FP8, DECODING[-1:]),
    "start-up": (SMOLLM2, torch.float16, torch.float16, TREES),
    "wide heads": (WIDE, BF16, BF16, TREES),
}


@dataclass(frozen=True)
class Driver:
    """As much of a driver as compiling asks for."""

    capability: int  # of the GPU, 90 for a Hopper

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


Launches = list[tuple[str, Any]]  # name and kernel of everything launched, in order


@contextmanager
def compiling() -> Iterator[Launches]:
    """Launches compile, and do nothing."""
    launched: Launches = []
    run = JITFunction.run

    def only_compile(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launched.append((self.__name__, run(self, *args, grid=grid, warmup=True, **options)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", only_compile)
        yield launched


def cache_of(
    heads: tuple[int, int, int], dtype: torch.dtype, stored: torch.dtype, num_blocks: int
) -> KVCache:
    num_heads, num_kv_heads, head_dim = heads
    config = tiny_config(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim)
    return KVCache(config, num_blocks, 16, dtype, CPU, stored=stored)


def launches_at_start_up(case: str) -> Launches:
    heads, dtype, stored, _ = CASES[case]
    with compiling() as launched:
        warm_up(cache_of(heads, dtype, stored, 2), heads[0], dtype)
    return launched


def launches(case: str) -> Launches:
    """Those of the passes, and of compaction after each."""
    (num_heads, num_kv_heads, head_dim), dtype, stored, passes = CASES[case]
    with compiling() as launched:
        for lengths in passes:
            step, num_blocks = make_pass(lengths, 16, 0)
            cache = cache_of((num_heads, num_kv_heads, head_dim), dtype, stored, num_blocks)
            qkv = torch.zeros(len(step.slots), num_heads + 2 * num_kv_heads, head_dim, dtype=dtype)
            q, k, v = qkv.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
            rotation = torch.zeros(len(step.slots), 1, head_dim, dtype=dtype)
            heads = PagedHeads.of(cache, num_heads)
            plan = AttentionPlan.for_step(step, heads, CPU, num_programs=264)
            attention = TritonAttention(plan, cache, step.slots, step.ancestors)
            for layer in range(CONFIG.num_layers):
                attention.rotate_and_attend(layer, q, k, v, rotation, rotation)
            for num_moves in (1, 3, 9, 64):
                moves = torch.zeros(len(lengths), num_moves, dtype=torch.int64)
                compact(cache.k, cache.v, moves, moves)
    return launched


def usage(kernel: Any) -> dict[str, int]:
    """Bytes of stack that a thread keeps in memory because its registers are full, and those registers."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        said = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return {name: sum(map(int, re.findall(rf"{name}:(\d+)", said))) for name in ("STACK", "REG")}


if __name__ == "__main__":
    driver.set_active(Driver(90))
    for case in CASES:
        known = {kernel.hash for _, kernel in launches_at_start_up(case)} if case == "start-up" else set()
        seen = set()
        for name, kernel in launches(case):
            if kernel.hash not in seen:
                seen.add(kernel.hash)
                buffers = re.findall(
                    r"local_alloc : \(\) -> !ttg.memdesc<(\d+)x\d+x\d+x", kernel.asm["ttgir"]
                )
                about = {
                    "known": kernel.hash in known,
                    "shared": kernel.metadata.shared,
                    "stack": usage(kernel)["STACK"],
                    "memory": re.findall(r"ld\.global|bar\.sync|st\.global", kernel.asm["ptx"]),
                    "buffers": min(map(int, buffers), default=0),
                }
                print(json.dumps({"case": case, "kernel": name, **about}), flush=True)
