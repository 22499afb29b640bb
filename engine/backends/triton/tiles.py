"""How large a tile of the attention kernel is: a small table by shape, instead of a search on every machine.

A tile holds the query heads that share a KV head, for some neighbouring queries of one request, so that K
and V are read once for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.backends.kv_cache import KVCache

# The tensor cores take no fewer rows than the first; more than the last do not fit the registers. For each,
# how many programs run beside each other on a Hopper's processor, as its registers and shared memory allow.
_PROGRAMS = {16: 3, 32: 2, 64: 2, 128: 1}
_ROWS = tuple(_PROGRAMS)
_HOPPER_SHARED = 228 << 10  # bytes of shared memory of such a processor
_TURN_BYTES = 16 << 10
# With fewer, Triton keeps one buffer for K and V and reads the next keys only when it is done with these:
# where they lie is itself loaded, from the block table, which takes stages of its own.
_STAGES = 5


@dataclass(frozen=True)
class PagedHeads:
    """What attention has to know of a model and of its cache. `itemsize`: bytes of a number, of the wider of
    queries and cache."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    itemsize: int

    @classmethod
    def of(cls, cache: KVCache, num_heads: int) -> PagedHeads:
        """Queries are taken to be no wider than bfloat16 over a float8 cache."""
        return cls(num_heads, cache.num_kv_heads, cache.k.shape[-1], cache.block_size, cache.dtype.itemsize)

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def is_wide(self) -> bool:
        """Whether numbers are wider than the tensor cores multiply exactly."""
        return self.itemsize > 2


@dataclass(frozen=True)
class Tile:
    """Sizes that the kernel is compiled for, except `queries`: as many variants as there are `rows`."""

    queries: int  # neighbouring queries of one request
    rows: int  # queries times query heads per KV head, rounded up to a power of two
    keys: int  # read in one turn of the loop
    num_warps: int
    num_stages: int  # turns whose keys are on their way at once

    def programs(self, shared_memory: int = _HOPPER_SHARED) -> int:
        """How many run beside each other on one processor, by its bytes of shared memory. About: with less of
        it fewer do, in proportion; small heads and a float8 cache each leave room for one more."""
        most = _PROGRAMS.get(self.rows, 1)
        return max(1, min(most, most * shared_memory // _HOPPER_SHARED))


def choose_tile(heads: PagedHeads, max_queries: int) -> Tile:
    """The tile for requests of up to `max_queries` queries each.

    Few rows are bound by memory: a turn reads 16 KB of K and as much of V, and three programs of that size
    fit a Hopper processor. Many rows are bound by the tensor cores and by registers, and by shared memory
    where heads are wide: 99 KB is all that some GPUs have. float32 does without tensor cores, which takes
    more registers: its tiles have few rows, unless more query heads share a KV head. The masks of head sizes
    that are no power of two take registers, too. Next to nothing spills but float32 over a float8 cache.
    """
    size = padded(heads.head_dim) * heads.itemsize  # bytes of a key
    is_masked = padded(heads.head_dim) != heads.head_dim
    largest = 32 if heads.is_wide or size > 256 else 128
    wanted = max(heads.group, min(max_queries * heads.group, largest))
    rows = next((rows for rows in _ROWS if rows >= wanted), padded(wanted))
    most_keys = 128 if rows < 64 else 16 if heads.is_wide else 32 if is_masked else 64
    return Tile(
        queries=max(1, min(rows // heads.group, max_queries)),
        rows=rows,
        keys=min(most_keys, _TURN_BYTES // size),
        num_warps=8 if rows >= (32 if heads.is_wide else 128) else 4,
        num_stages=_STAGES,
    )


def query_counts(heads: PagedHeads) -> list[int]:
    """One `max_queries` for every variant of the kernel that passes of these heads can ask for."""
    wanted = [1, *(max(1, rows // heads.group) for rows in _ROWS)]
    return list({choose_tile(heads, count).rows: count for count in wanted}.values())


def padded(size: int) -> int:
    """The size that a dimension takes in a matrix product."""
    return max(16, power_of_two(size))


def power_of_two(size: int) -> int:
    """The same or the next one: the sizes that Triton knows."""
    return 1 << (size - 1).bit_length()
