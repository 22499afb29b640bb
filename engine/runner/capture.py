"""The CUDA graphs of decoding passes, captured at start-up."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import torch

from engine.backends.attention import MakeAttention
from engine.batch import Batch, BatchLimits
from engine.errors import GraphCaptureError
from engine.runner.bucket import Bucket, BucketBuffers
from engine.runner.capture_stream import capture_stream, on_capture_stream
from engine.runner.device import is_out_of_memory
from engine.runner.graphs import (
    Capture,
    DraftGraphs,
    Run,
    StepGraph,
    StepGraphs,
)
from engine.runner.profile import decoding_batch, room
from engine.runner.runner import Runner

logger = logging.getLogger(__name__)

_MOST_TOKENS = 512  # of a captured pass: in a larger one the host is not what takes the time
# Requests whose heads guess by a graph: of more, guessing takes longer than launching it, and much memory.
_MOST_GUESSING = 64
_MOST_SECONDS = 30.0  # for all of them, as far as they are done by then


def capture_graphs(runner: Runner, limits: BatchLimits) -> None:
    """Let the runner decode by CUDA graphs where its backend's attention can be in them. Do it when the cache
    has its size, and before the first request: it writes into the cache and the per-request state."""
    attentions = runner.backend.fixed_attentions(runner.cache, limits.max_model_len)
    if attentions is not None:
        buckets = default_buckets(limits, runner.decoder.config.max_positions)
        before, _ = torch.cuda.mem_get_info(runner.cache.k.device)
        runner.use_graphs(make_graphs(runner, buckets, attentions.make, _CudaCapture()))
        after, _ = torch.cuda.mem_get_info(runner.cache.k.device)
        logger.info("CUDA graphs took %.2f GiB.", (before - after) / 2**30)


def default_buckets(limits: BatchLimits, max_positions: int) -> list[Bucket]:
    """Requests and tokens in powers of two, up to as many as there can be."""
    max_nodes = min(limits.max_drafts + 1, max_positions)
    most = min(_MOST_TOKENS, limits.max_num_batched_tokens)
    return [
        Bucket.of(num_requests, num_requests * nodes, max_nodes)
        for num_requests in _doubling(limits.max_num_seqs)
        for nodes in _doubling(max_nodes)
        if num_requests * nodes <= most
    ]


def make_graphs(
    runner: Runner,
    buckets: Sequence[Bucket],
    make_attention: MakeAttention,
    capture: Capture,
    most_seconds: float = _MOST_SECONDS,
) -> StepGraphs:
    """Graphs of all buckets that the cache has room for, as far as time and memory go: of the largest, which
    a smaller pass can be padded to, and from the smallest up, the commonest.

    Raises GraphCaptureError where a capture fails; then the process is of no more use.
    """
    graphs: list[StepGraph] = []
    start = time.perf_counter()
    *others, largest = sorted(set(buckets))
    # What the largest has taken of the memory they share is enough for the others.
    for index, bucket in enumerate([largest, *others]):
        seconds = time.perf_counter() - start
        if seconds > most_seconds:
            left = len(others) + 1 - index
            logger.warning("CUDA graphs: %d of %d sizes left out, it took too long.", left, len(others) + 1)
            break
        example = _example(runner, bucket)
        if example is None:
            continue
        graph = _rehearsed_graph(runner, bucket, make_attention, capture, example)
        if graph is not None:
            graphs.append(_recorded(graph, capture))
            logger.info(
                "CUDA graph %d of %d: %d requests, %d tokens (%.1f s)",
                index + 1,
                len(others) + 1,
                bucket.num_requests,
                bucket.num_tokens,
                time.perf_counter() - start,
            )
        elif bucket != largest:
            break  # the next is larger
    return StepGraphs(graphs)


@torch.inference_mode()
def _rehearsed_graph(
    runner: Runner, bucket: Bucket, make_attention: MakeAttention, capture: Capture, example: Batch
) -> StepGraph | None:
    """A graph ready to be recorded; None where there is no memory for it. Raises GraphCaptureError."""
    cache = runner.cache
    try:
        buffers = BucketBuffers(bucket, runner.work.hidden.spare_seat, cache.block_size, cache.k.device)
        num_heads = runner.decoder.config.num_heads
        attention = make_attention(bucket, num_heads, buffers.slots, buffers.ancestors)
        drafting = _make_drafting(runner, buffers, make_attention)
        graph = StepGraph(buffers, attention, drafting, runner.work)
        graph.rehearse(capture, example)
    except Exception as error:
        if not is_out_of_memory(error):
            raise GraphCaptureError(f"A pass of {bucket} failed: {error}") from error
        logger.warning("CUDA graphs: no memory for one of %s: %s", bucket, error)
        return None
    return graph


@torch.inference_mode()
def _recorded(graph: StepGraph, capture: Capture) -> StepGraph:
    """Raises GraphCaptureError. Out of memory is no exception: torch's allocator, and the stream, stay in the
    middle of the capture for good."""
    try:
        graph.record(capture)
    except Exception as error:
        raise GraphCaptureError(f"The capture of {graph.bucket} failed: {error}") from error
    return graph


def _make_drafting(
    runner: Runner, buffers: BucketBuffers, make_attention: MakeAttention
) -> DraftGraphs | None:
    drafter, bucket = runner.drafter, buffers.bucket
    if not drafter.capturable or bucket.max_nodes == 1:
        return None
    attention, levels = None, num_guessed_levels(runner, bucket)
    if levels and drafter.root_heads is not None:
        ancestors = torch.zeros_like(buffers.root_slots)
        attention = make_attention(bucket.roots(), drafter.root_heads, buffers.root_slots, ancestors)
    return DraftGraphs(buffers, attention, runner.work, levels)


def num_guessed_levels(runner: Runner, bucket: Bucket) -> int:
    """How many levels heads guess by the bucket's own graphs."""
    if not runner.drafter.capturable or bucket.num_requests > _MOST_GUESSING:
        return 0
    return min(runner.drafter.num_levels, bucket.max_nodes - 1)


def _example(runner: Runner, bucket: Bucket) -> Batch | None:
    """A pass of exactly this size, None where the cache has no room for it."""
    requests = bucket.num_requests
    shares = [bucket.num_tokens // requests] * requests
    for index in range(bucket.num_tokens % requests):
        shares[index] += 1
    if room(runner, requests) <= max(shares):
        return None
    return decoding_batch(runner, shares)


class _CudaCapture:
    """Graphs that share one pool of memory. No two of them run at once, and what one leaves is used before
    the next runs."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def rehearse(self, run: Run) -> None:
        """On the stream of the capture, which libraries may keep workspaces for."""
        with on_capture_stream():
            run()

    def record(self, run: Run) -> Run:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=capture_stream()):
            run()
        return graph.replay


def _doubling(most: int) -> list[int]:
    """1, 2, 4, ... and `most` itself."""
    sizes = [1 << power for power in range(most.bit_length()) if 1 << power < most]
    return [*sizes, most]
