"""How many threads share the work of the kernels: as many as the host grants, unless told otherwise.

They are the kernels' own (`kernels/pool.h`): torch's OpenMP threads keep their cores while they wait for each
other, which costs up to ten times the speed under a quota or beside other processes."""

from __future__ import annotations

from engine import host

_asked: int | None = None


def num_threads() -> int:
    global _asked
    if _asked is None:
        _asked = host.num_cpus()
    return _asked


def use_threads(count: int | None) -> int:
    """Share the work of later calls among so many, or as many as the host grants; returns how many."""
    global _asked
    _asked = count
    return num_threads()
