"""What the device itself does of a step: how long it is busy, and what attention alone takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import torch

from engine.messages import SamplingParams
from engine.model.config import DecoderConfig
from engine.runner.attention import paged_attention
from engine.runner.kv_cache import KVCache
from engine.runner.step_input import build_rows
from engine.scheduling.drafting import Acceptance
from engine.scheduling.request import Request


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals, each (start, end)."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def busy_seconds(device: torch.device, run: Callable[[], object]) -> float | None:
    """Seconds of a run in which anything ran on the device; None where the host is the device."""
    if device.type != "cuda":
        run()
        return None
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.cuda.synchronize(device)
    return 1e-6 * covered(  # events are in microseconds
        (event.time_range.start, event.time_range.end)
        for event in profile.events() or ()
        if event.device_type.name == "CUDA"
    )


def elapsed_seconds(device: torch.device, run: Callable[[], object]) -> float:
    """Seconds of a run by the device's own clock, where it has one."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    first, last = (
        torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        for _ in range(2)
    )
    first.record()
    run()
    last.record()
    torch.cuda.synchronize(device)
    return float(first.elapsed_time(last)) / 1000


@torch.inference_mode()
def attention_seconds(
    config: DecoderConfig,
    cache: KVCache,
    num_requests: int,
    context: int,
    repeats: int,
) -> list[float]:
    """Seconds of the attention of all layers, for requests that decode one token over `context` positions.

    cache: with room for them; their blocks lie scattered in it, as after hours of serving.
    """
    device, dtype = cache.k.device, cache.dtype
    blocks_each = -(-context // cache.block_size)
    order = torch.randperm(cache.num_blocks, generator=torch.Generator().manual_seed(0)).tolist()
    requests = [
        Request(
            request_id=str(index),
            arrival=index,
            token_ids=[0] * context,
            num_prompt_tokens=context,
            sampling=SamplingParams(max_tokens=1),
            seed=0,
            acceptance=Acceptance(),
            num_computed=context - 1,
            block_table=order[index * blocks_each : (index + 1) * blocks_each],
            slot=index,
        )
        for index in range(num_requests)
    ]
    rows = build_rows(
        requests, [context - 1] * num_requests, [context] * num_requests, cache.block_size, device
    )
    attention = paged_attention(rows, cache, config.num_heads, config.num_kv_heads)
    q = torch.randn(num_requests, config.num_heads, config.head_dim, dtype=dtype, device=device)
    kv = torch.randn(2, num_requests, config.num_kv_heads, config.head_dim, dtype=dtype, device=device)

    def all_layers() -> None:
        for layer in range(config.num_layers):
            attention(layer, q, kv[0], kv[1])

    all_layers()
    return [elapsed_seconds(device, all_layers) for _ in range(repeats)]
