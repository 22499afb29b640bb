"""What the attention kernels of one pass work on: made on the host once a step, used by every layer.

Attention is cut into *items*: a tile of queries of one request against a run of its keys. Where there are few
tiles, runs are short, so that the whole device has work (flash-decoding, Dao et al. 2023,
https://crfm.stanford.edu/2023/10/12/flashdecoding.html); how short follows from this step's lengths and is
only a number in the list. Everything that changes from step to step lies in one device buffer, and in a plan
that was reserved it stays in place: a CUDA graph captured with the plan can be replayed after `update`. An
item of zeros has no queries, and the kernels leave it at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.backends.rows import IntArray, PassShape
from engine.backends.triton.tiles import PagedHeads, Tile, choose_tile
from trees.family import MAX_DRAFT_NODES

# first row, end row, first key, end key, place of its partial result or -1, place of its block table
ITEM_FIELDS = 6
MERGE_FIELDS = 4  # first row, end row, first partial result, number of partial results
_LEAST_KEYS = 128  # of a run: a shorter one costs more in merging than it gains
_ALIGNMENT = 16  # integers: where a section may begin, so that wide loads may be used

_SECTIONS = ("items", "split tiles", "tokens", "blocks")

Ints = NDArray[np.int32]


@dataclass(frozen=True)
class Capacity:
    """The largest pass of a plan that is reserved. `max_queries` and `max_blocks` are one request's."""

    num_requests: int
    num_tokens: int
    max_queries: int
    max_blocks: int


class Scratch:
    """Memory for partial results, shared by plans of which no two run at once. It is as large as the largest
    of them asked for; what was handed out before it grew stays valid."""

    def __init__(self, device: torch.device) -> None:
        self._memory = torch.empty(0, device=device)

    def take(self, size: int) -> Tensor:
        """[size] float32"""
        if size > len(self._memory):
            self._memory = self._memory.new_empty(size)
        return self._memory[:size]

    @property
    def nbytes(self) -> int:
        return self._memory.nbytes


@dataclass(frozen=True)
class _Work:
    """One pass cut up."""

    items: Ints  # [num_items, ITEM_FIELDS]
    merges: Ints  # [num_split_tiles, MERGE_FIELDS]
    num_partials: int
    prefix_len: Ints  # [num_tokens]
    tables: Ints  # [num_blocks] all block tables, one after the other


class AttentionPlan:
    """The work list on the device, and what its launches depend on."""

    items: Tensor  # [num_items, ITEM_FIELDS] int32
    merges: Tensor  # [num_merges, MERGE_FIELDS] int32
    prefix_len: Tensor  # [num_tokens] int32
    tables: Tensor  # [num_blocks] int32, all block tables, one after the other

    def __init__(
        self, heads: PagedHeads, max_queries: int, device: torch.device, num_programs: int | None
    ) -> None:
        """Only what both ways to make one share: `for_step` and `reserve`."""
        self.heads = heads
        self.tile = choose_tile(heads, max_queries)
        programs = programs_at_once(device, self.tile) if num_programs is None else num_programs
        self._num_runs = max(1, programs // heads.num_kv_heads)
        self._device = device

    @classmethod
    def for_step(
        cls, step: PassShape, heads: PagedHeads, device: torch.device, num_programs: int | None = None
    ) -> AttentionPlan:
        """The plan of one pass. `num_programs`: how many run at once; None asks the device."""
        plan = cls(heads, int(np.diff(step.starts).max(initial=1)), device, num_programs)
        work = plan._cut(step)
        sizes = (len(work.items), len(work.merges), len(work.prefix_len), len(work.tables))
        plan._allocate(*sizes, work.num_partials, Scratch(device))
        plan._load(work)
        return plan

    @classmethod
    def reserve(
        cls,
        capacity: Capacity,
        heads: PagedHeads,
        device: torch.device,
        num_programs: int | None = None,
        scratch: Scratch | None = None,
    ) -> AttentionPlan:
        """A plan for any pass within the capacity, empty until `update`. Its tensors stay where they are.

        scratch: on the device; None makes one for this plan alone.
        """
        plan = cls(heads, capacity.max_queries, device, num_programs)
        tokens, runs = capacity.num_tokens, plan._num_runs
        tiles = min(tokens, tokens // plan.tile.queries + capacity.num_requests)
        # A run is as long as all tiles' keys over `runs`, or longer. So splitting adds no more items than
        # that, no more tiles than that exceed one run, and those become twice as many items at most.
        num_blocks = capacity.num_requests * capacity.max_blocks
        sizes = (tiles + runs, min(tiles, runs), tokens, num_blocks)
        plan._allocate(*sizes, min(tiles + runs, 2 * runs), scratch or Scratch(device))
        return plan

    @property
    def nbytes(self) -> int:
        """Without the scratch."""
        return self._buffer.nbytes

    def update(self, step: PassShape) -> None:
        """Plan another pass in the same place, after whatever the current stream still has to do.

        Raises ValueError where the pass is larger than what was reserved.
        """
        self._load(self._cut(step))

    def _allocate(
        self,
        num_items: int,
        num_merges: int,
        num_tokens: int,
        num_blocks: int,
        num_partials: int,
        scratch: Scratch,
    ) -> None:
        shapes = ((num_items, ITEM_FIELDS), (num_merges, MERGE_FIELDS), (num_tokens,), (num_blocks,))
        sizes = [math.prod(shape) for shape in shapes]
        self._places = [0, *np.cumsum([-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]).tolist()]
        # Zeros, so that a plan that was only reserved works on nothing: a graph may be captured with it.
        self._buffer = torch.zeros(self._places[-1], dtype=torch.int32, device=self._device)
        self.items, self.merges, self.prefix_len, self.tables = (
            self._buffer[place : place + size].view(shape)
            for place, size, shape in zip(self._places, sizes, shapes, strict=False)
        )
        per_head = (num_partials, self.heads.num_kv_heads, self.tile.rows)
        num_rows, head_dim = math.prod(per_head), self.heads.head_dim
        memory = scratch.take(num_rows * (head_dim + 1))
        # What each run of a split tile reads out by itself, and the logarithm of its share.
        self.partials = memory[: num_rows * head_dim].view(*per_head, head_dim)
        self.shares = memory[num_rows * head_dim :].view(per_head)

    def _load(self, work: _Work) -> None:
        """One copy, up to the last block table's end."""
        sections = (work.items, work.merges, work.prefix_len, work.tables)
        rooms = (self.items, self.merges, self.prefix_len, self.tables)
        for name, values, room in zip(_SECTIONS, sections, rooms, strict=True):
            if len(values) > len(room):
                raise ValueError(f"a pass of {len(values)} {name} is too large for a plan of {len(room)}")
        # A new buffer every time: the last may still be on its way, and torch keeps it until it is there.
        used = self._places[3] + work.tables.size
        packed = torch.zeros(used, dtype=torch.int32, pin_memory=self._device.type == "cuda")
        for place, values in zip(self._places, sections, strict=False):
            packed.numpy()[place : place + values.size] = values.reshape(-1)
        self._buffer[:used].copy_(packed, non_blocking=True)

    def _cut(self, step: PassShape) -> _Work:
        """Tiles of queries, and runs of keys where there are fewer tiles than programs."""
        starts, queries = step.starts, self.tile.queries
        blocks = -(-step.context_lens // self.heads.block_size)
        tables = np.fromiter(
            chain.from_iterable(
                table[:count] for table, count in zip(step.block_tables, blocks.tolist(), strict=True)
            ),
            dtype=np.int32,
            count=int(blocks.sum()),
        )
        tiles = -(-np.diff(starts) // queries)
        request = np.repeat(np.arange(len(tiles)), tiles)
        first_row = starts[request] + _places_within(tiles) * queries
        end_row = np.minimum(first_row + queries, starts[request + 1])
        # Which nodes a row sees is only known on the device; here it may be any of a tree's.
        num_rows = int(starts[-1])
        seen = np.maximum.reduceat(step.prefix_len[:num_rows], first_row) if num_rows else first_row
        keys = np.minimum(seen + MAX_DRAFT_NODES + 1, step.context_lens[request])

        run = max(_LEAST_KEYS, -(-int(keys.sum()) // self._num_runs))
        run = -(-run // self.tile.keys) * self.tile.keys
        runs = -(-keys // run)
        item = np.repeat(np.arange(len(keys)), runs)
        first_key = _places_within(runs) * run
        end_key = np.minimum(first_key + run, keys[item])
        split = runs > 1
        partial = np.where(split[item], np.cumsum(split[item]) - 1, -1)
        table = (np.cumsum(blocks) - blocks)[request]
        items = np.stack((first_row[item], end_row[item], first_key, end_key, partial, table[item]), axis=1)
        # The longest first: what starts last then ends soon.
        items = items[np.argsort(first_key - end_key, kind="stable")]
        first_partial = np.cumsum(runs[split]) - runs[split]
        merges = np.stack((first_row[split], end_row[split], first_partial, runs[split]), axis=1)
        return _Work(
            items.astype(np.int32),
            merges.astype(np.int32),
            int(runs[split].sum()),
            step.prefix_len[:num_rows].astype(np.int32),
            tables,
        )


def _places_within(counts: IntArray) -> IntArray:
    """0 to counts[i] - 1 for each i, one after the other."""
    places: IntArray = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    return places


def programs_at_once(device: torch.device, tile: Tile) -> int:
    """How many programs of the kernel run beside each other."""
    if device.type != "cuda":
        return 1  # Triton's interpreter runs one after the other
    properties = torch.cuda.get_device_properties(device)
    shared_memory: int = properties.shared_memory_per_multiprocessor
    return properties.multi_processor_count * tile.programs(shared_memory)
