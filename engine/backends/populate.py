"""Memory that is there before it is needed.

The operating system gives pages of memory when they are first written, and a step waits while it clears them.
In a KV cache of huge pages that takes a hundred milliseconds at once: the first token behind a page's end
writes to one more page of every layer and head.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import threading
import time
import weakref
from collections.abc import Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray

logger = logging.getLogger(__name__)

_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, Linux 5.14
_NAME = "populate"  # of threads
_PAGE = mmap.PAGESIZE
_CHUNK = 2 << 20  # bytes: a huge page
_REST = 4.0  # times what a chunk took: steps have the machine to themselves meanwhile

_madvise = ctypes.CDLL(None, use_errno=True).madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def populate(arrays: Sequence[NDArray[np.generic]], rows: int) -> None:
    """Let the system give the pages of some arrays of one size meanwhile, first the beginnings of all their
    `rows` equal parts. What they hold stays as it is. The thread ends early where the arrays are given up, or
    where the system cannot do it."""
    references = [weakref.ref(array) for array in arrays]
    stride = arrays[0].nbytes // rows
    thread = threading.Thread(target=_run, args=(references, rows, stride), name=_NAME, daemon=True)
    thread.start()


def wait_until_populated() -> None:
    """For measurements: returns once no memory is being populated in this process."""
    for thread in threading.enumerate():
        if thread.name == _NAME:
            thread.join()


def _run(references: Sequence[weakref.ref[NDArray[np.generic]]], rows: int, stride: int) -> None:
    """stride: bytes of each of the rows."""
    for offset, row, reference in product(range(0, stride, _CHUNK), range(rows), references):
        array = reference()  # kept for one chunk, so that the memory may go
        if array is None:
            return
        began = time.perf_counter()
        if not _give(array.ctypes.data + row * stride + offset, min(_CHUNK, stride - offset)):
            return
        del array
        time.sleep(_REST * (time.perf_counter() - began))


def _give(address: int, size: int) -> bool:
    """Let there be pages for this memory, but for a part of a page at either end."""
    first, end = -(-address // _PAGE) * _PAGE, (address + size) // _PAGE * _PAGE
    if end <= first or not _madvise(first, end - first, _POPULATE_WRITE):
        return True
    logger.debug("Memory cannot be had in advance: error %d.", ctypes.get_errno())
    return False
