"""What CUDA graphs keep of a GPU's memory beside the passes themselves, known before there is any."""

from __future__ import annotations

from engine.backends.attention import FixedAttentions
from engine.batch import BatchLimits
from engine.runner.capture import default_buckets, num_guessed_levels
from engine.runner.drafter import row_size
from engine.runner.runner import Runner


def kept_bytes(runner: Runner, limits: BatchLimits, attentions: FixedAttentions) -> int:
    """Bytes of the attention of all default graphs, and of the hidden rows that each leaves to whoever reads
    them.

    What the driver takes for a graph itself is not among them.
    """
    config, drafter = runner.decoder.config, runner.drafter
    sizes, hidden = [], 0
    for bucket in default_buckets(limits, config.max_positions):
        sizes.append((bucket, config.num_heads))
        if drafter.root_heads is not None and num_guessed_levels(runner, bucket):
            sizes.append((bucket.roots(), drafter.root_heads))
        hidden += bucket.num_tokens * row_size(drafter, config) * runner.decoder.embedding.itemsize
    return attentions.kept_bytes(sizes) + hidden
