"""The kernels compile for a Hopper GPU, fit it, and are not compiled again for other lengths. In every tile
that may be chosen they fit other GPUs too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest

from engine.backends.triton.tiles import Tile
from tests.engine.backends.triton import hopper

# By capability: bytes of shared memory that one program may have, and that a processor has. What is compiled
# for 8.0 has to run on 8.6 too, which has as little as 8.9.
SHARED_MEMORY = {
    80: (99 << 10, 164 << 10),
    89: (99 << 10, 100 << 10),
    90: (227 << 10, 228 << 10),
    100: (227 << 10, 228 << 10),
    120: (99 << 10, 100 << 10),
}
REGISTERS = 1 << 16  # of a processor
FEW_BYTES = 32  # that a thread may keep in memory: a few numbers, not those of its products
SPILLED = {120: 96}  # where it is more: prompts of head size 128, whose tiles other GPUs have room for
MANY_HEADS_BYTES = 256  # the same in float32, where more than 32 query heads share a KV head


def compiled(program: str, *arguments: str) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", program, *arguments],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def kernels() -> list[dict[str, Any]]:
    return compiled("tests.engine.backends.triton.hopper")


@pytest.mark.timeout(600)
def test_each_kernel_is_compiled_once_whatever_the_lengths(kernels: list[dict[str, Any]]) -> None:
    counts = Counter((kernel["case"], kernel["kernel"]) for kernel in kernels)
    assert {case for case, _ in counts} == set(hopper.CASES)
    assert {name for _, name in counts} == {"store", "attend", "merge", "compact"}
    assert set(counts.values()) == {1}


def test_tiles_fit_shared_memory_and_registers(kernels: list[dict[str, Any]]) -> None:
    for kernel in kernels:
        assert kernel["shared"] <= SHARED_MEMORY[90][0] and kernel["stack"] == 0, (
            kernel["case"],
            kernel["kernel"],
        )


def test_keys_are_on_their_way_while_others_are_read(kernels: list[dict[str, Any]]) -> None:
    for kernel in kernels:
        if kernel["kernel"] == "attend":
            assert kernel["buffers"] > 1, kernel["case"]


def test_compaction_reads_everything_before_it_writes(kernels: list[dict[str, Any]]) -> None:
    for kernel in kernels:
        if kernel["kernel"] == "compact":
            memory = kernel["memory"]
            first_write = memory.index("st.global")
            assert memory[first_write - 1] == "bar.sync" and "ld.global" not in memory[first_write:]


def test_nothing_is_compiled_after_start_up(kernels: list[dict[str, Any]]) -> None:
    assert all(kernel["known"] for kernel in kernels if kernel["case"] == "start-up")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_every_tile_fits_and_as_many_run_at_once_as_is_planned_for(capability: int) -> None:
    most, processor = SHARED_MEMORY[capability]
    kernels = compiled("tests.engine.backends.triton.every_tile", str(capability))
    assert {kernel["kernel"] for kernel in kernels} == {"store", "attend", "merge", "compact"}
    for kernel in kernels:
        assert kernel["shared"] <= most, kernel
        attends, wide = kernel["kernel"] == "attend", kernel["dtype"] == "torch.float32"
        many_heads = attends and wide and kernel["group"] > 32
        spilled = MANY_HEADS_BYTES if many_heads else SPILLED.get(capability, FEW_BYTES)
        assert kernel["STACK"] <= spilled, kernel
        if attends and not wide and kernel["head_dim"] >= 64:
            registers = -(-kernel["REG"] // 8) * 8 * 32 * kernel["warps"]
            fit = min(REGISTERS // registers, processor // (kernel["shared"] + 1024))
            planned = Tile(1, kernel["rows"], kernel["keys"], kernel["warps"], 1).programs(processor)
            room = 2 if kernel["stored"] != kernel["dtype"] else 1  # a float8 cache takes half the memory
            assert -1 <= fit - planned <= room, kernel
