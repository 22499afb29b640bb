"""Memory is there before it is needed, keeps what it holds, and is given up with its array."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from engine.backends import populate
from engine.backends.populate import wait_until_populated

MEGABYTE = 1 << 20


def resident_bytes(array: NDArray[np.uint8]) -> int:
    """Of the mapping that an array's middle lies in: its first page may have one of its own."""
    middle = array.ctypes.data + array.nbytes // 2
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    for line in lines:
        first, _, end = line.split()[0].partition("-")
        if end and int(first, 16) <= middle < int(end, 16):
            return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Rss:"))
    raise AssertionError("the array is mapped nowhere")


def test_pages_come_and_keep_what_they_hold() -> None:
    array = np.zeros((3, 20 * MEGABYTE), dtype=np.uint8)
    array[1, 5 * MEGABYTE] = 7
    before = resident_bytes(array)
    populate.populate([array], 3)
    wait_until_populated()
    if resident_bytes(array) == before:
        pytest.skip("this system gives no pages in advance")
    assert resident_bytes(array) - before > 50 * MEGABYTE
    assert array[1, 5 * MEGABYTE] == 7 and int(array.sum()) == 7


def test_it_ends_with_the_array(monkeypatch: pytest.MonkeyPatch) -> None:
    started, goes_on = threading.Event(), threading.Event()

    def give(address: int, size: int) -> bool:
        started.set()
        return goes_on.wait(10)

    monkeypatch.setattr(populate, "_give", give)
    array = np.zeros((2, 8 * MEGABYTE), dtype=np.uint8)
    populate.populate([array], 2)
    assert started.wait(10)
    del array
    calls = threading.active_count()
    goes_on.set()
    wait_until_populated()
    assert threading.active_count() == calls - 1


def test_it_ends_where_the_system_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    addresses: list[int] = []

    def refuse(address: int, size: int, advice: int) -> int:
        addresses.append(address)
        return -1

    monkeypatch.setattr(populate, "_madvise", refuse)
    array = np.zeros((2, 8 * MEGABYTE), dtype=np.uint8)
    populate.populate([array], 2)
    wait_until_populated()
    assert len(addresses) == 1
