"""The kernels compile for a Hopper GPU, fit it, and are not compiled again for other lengths."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest

from tests.engine.triton import hopper

SHARED_MEMORY = 227 << 10  # bytes that one program may have


@pytest.fixture(scope="module")
def kernels() -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.triton.hopper"],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.timeout(600)
def test_each_kernel_is_compiled_once_whatever_the_lengths(kernels: list[dict[str, Any]]) -> None:
    counts = Counter((kernel["case"], kernel["kernel"]) for kernel in kernels)
    assert {case for case, _ in counts} == set(hopper.CASES)
    assert {name for _, name in counts} == {"store", "attend", "merge", "compact"}
    assert set(counts.values()) == {1}


def test_tiles_fit_shared_memory_and_registers(kernels: list[dict[str, Any]]) -> None:
    for kernel in kernels:
        assert kernel["shared"] <= SHARED_MEMORY and kernel["stack"] == 0, (kernel["case"], kernel["kernel"])


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
