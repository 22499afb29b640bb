"""Passes over made-up requests, for the tests of attention kernels."""

from __future__ import annotations

import numpy as np
import torch

from engine.backends.rows import PassInput
from engine.batch import Batch
from engine.runner.layout import lay_out
from engine.runner.step_buffers import StepBuffers
from engine.runner.step_input import StepInput
from tests.engine.tiny import CONFIG, CPU


def lay_out_batch(batch: Batch, block_size: int) -> StepInput:
    """The pass of a batch, whose trees are to be filled in."""
    layout = lay_out(batch.scheduled, block_size)
    buffers = StepBuffers.of_pass(layout, [0] * len(batch.scheduled), block_size, CPU)
    buffers.place()
    return buffers.step(layout)


def make_pass(
    lengths: list[tuple[int, int, int]], block_size: int, seed: int, vocab: int = CONFIG.vocab_size
) -> tuple[PassInput, int]:
    """A pass over requests of (committed positions, chunk rows, tree nodes), and blocks that it needs.

    Trees are random; blocks lie in random places.
    """
    random = np.random.default_rng(seed)
    positions, prefix, ancestors, slots, tables, ends = [], [], [], [], [], []
    starts, used = [0], 0
    blocks = [-(-(sum(length)) // block_size) for length in lengths]
    places = random.permutation(sum(blocks))
    for (known, chunk, nodes), count in zip(lengths, blocks, strict=True):
        table = places[used : used + count].tolist()
        used += count
        rows = list(range(known, known + chunk + nodes))
        bits: list[int] = []
        depths: list[int] = []
        for node in range(nodes):
            parent = int(random.integers(node)) if node else 0
            bits.append((bits[parent] if node else 0) | 1 << node)
            depths.append(depths[parent] + 1 if node else 0)
        base = known + chunk
        positions += [*rows[:chunk], *(base + depth for depth in depths)]
        prefix += [*(row + 1 for row in rows[:chunk]), *[base] * nodes]
        ancestors += [*[0] * chunk, *bits]
        slots += [table[row // block_size] * block_size + row % block_size for row in rows]
        tables.append(table)
        ends.append(base + nodes)
        starts.append(starts[-1] + len(rows))
    step = PassInput(
        token_ids=torch.from_numpy(random.integers(vocab, size=len(positions))),
        positions=torch.tensor(positions),
        slots=torch.tensor(slots),
        prefix_len=np.array(prefix),
        ancestors=torch.from_numpy(np.array(ancestors, dtype=np.uint64).view(np.int64)),
        starts=np.array(starts),
        block_tables=tables,
        context_lens=np.array(ends),
    )
    return step, sum(blocks)
