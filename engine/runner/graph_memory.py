"""What CUDA graphs keep of a GPU's memory beside the passes themselves, known before there is any."""

from __future__ import annotations

import torch

from engine.backends.triton.plan import AttentionPlan, Capacity, Scratch, programs_at_once
from engine.backends.triton.tiles import PagedHeads, choose_tile
from engine.batch import BatchLimits
from engine.runner.capture import default_buckets, num_guessed_levels
from engine.runner.drafter import row_size
from engine.runner.runner import Runner


def kept_bytes(runner: Runner, limits: BatchLimits) -> int:
    """Bytes of the attention plans of all default graphs, with the scratch that they share, and of the hidden
    rows that each leaves to whoever reads them.

    What the driver takes for a graph itself is not among them.
    """
    cache, config, drafter = runner.cache, runner.decoder.config, runner.drafter
    nowhere = torch.device("meta")
    scratch, total = Scratch(nowhere), 0
    for bucket in default_buckets(limits, config.max_positions):
        plans = [(bucket, config.num_heads)]
        if drafter.root_heads is not None and num_guessed_levels(runner, bucket):
            plans.append((bucket.roots(), drafter.root_heads))
        for size, num_heads in plans:
            heads = PagedHeads.of(cache, num_heads, config.num_kv_heads)
            blocks = -(-(limits.max_model_len + size.max_nodes) // cache.block_size)
            programs = programs_at_once(cache.k.device, choose_tile(heads, size.max_nodes))
            capacity = Capacity(size.num_requests, size.num_tokens, size.max_nodes, blocks)
            total += AttentionPlan.reserve(capacity, heads, nowhere, programs, scratch).nbytes
        total += bucket.num_tokens * row_size(drafter, config) * runner.decoder.embedding.itemsize
    return total + scratch.nbytes
