"""What `gorgon bench gpu` measures of one model: steps by tokens, requests and context, plain and with trees;
drafting alone; how long the device waits for the host; attention alone, beside others'."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.attention import Attended, compare_attention
from bench.attention_passes import num_blocks
from bench.bandwidth import Bandwidth
from bench.device_time import busy_seconds
from bench.gpu_options import GpuBenchOptions
from bench.shapes import SHAPES, random_decoder, random_heads
from bench.step import WARM_UP_STEPS, Measured, decoding, figures_of, measure_steps
from engine.backends.kv_cache import KVCache, bytes_per_token, stored_dtype
from engine.batch import BatchLimits, ScheduledRequest
from engine.build import build
from engine.config import EngineConfig
from engine.engine import Engine
from engine.messages import SpeculationParams
from engine.model.config import DecoderConfig
from engine.model.decoder import Decoder
from engine.model.loader import load_config, load_decoder
from engine.runner import device as hardware
from engine.runner.drafter import Drafter, Proposal, RootRows
from engine.runner.heads_drafter import HeadsDrafter
from engine.runner.profile import measure_costs
from engine.runner.runner import Runner
from heads.checkpoint import load_heads
from heads.defaults import DEFAULT_MODEL
from heads.registry import list_head_sets, resolve_heads, resolve_model
from trees.family import MAX_DRAFT_NODES, TreeFamily

_BLOCK_SIZE = 16
_ROOM = 64  # positions of a tree, at the end of each request


def profile_family() -> TreeFamily:
    """The tree whose calibrated gains stand for acceptance: the default model's own."""
    return TreeFamily.load(list_head_sets()[DEFAULT_MODEL] / "tree.json")


@dataclass(frozen=True)
class Found:
    """Times of one kind of step, what each request's context takes in the cache, and the rest of its row."""

    measured: Measured
    kv_bytes: int
    facts: dict[str, Any]

    def row(self, bandwidth: float) -> dict[str, Any]:
        """bandwidth: bytes per second, as it turned out in the end."""
        return {**self.facts, **figures_of(self.measured, self.kv_bytes, bandwidth)}


class FreeDrafter(Drafter):
    """Trees of the right shape at once, with guesses that are hardly ever right: what they cost to verify."""

    def __init__(self, family: TreeFamily, vocab_size: int, device: torch.device) -> None:
        self._parents = torch.tensor(family.parents, device=device)
        self._offsets = torch.arange(len(family.parents), device=device)
        self._depth, self._vocab_size = family.max_depth, vocab_size

    def limit(self, scheduled: ScheduledRequest) -> int:
        return scheduled.num_drafts

    def grow(self, rows: RootRows) -> Proposal:
        width = rows.max_nodes
        tokens = (rows.roots.unsqueeze(1) + self._offsets[:width]) % self._vocab_size
        return Proposal(tokens, self._parents[:width].expand_as(tokens), self._depth)


@dataclass(frozen=True)
class _Model:
    """`load` makes the decoder anew: an engine may take its linear layers apart."""

    name: str
    config: EngineConfig
    decoder: DecoderConfig
    load: Callable[[], Decoder]
    device: torch.device
    dtype: torch.dtype
    stored: torch.dtype  # of the KV cache
    heads_dir: Path | None

    @property
    def token_bytes(self) -> int:
        return bytes_per_token(self.decoder, self.stored)


def measure_steps_of(name: str, options: GpuBenchOptions, bandwidth: Bandwidth) -> Iterator[Found]:
    """All steps of one model, the bandwidth in between. Raises GorgonError or HeadsError where it cannot be
    had or does not fit, and OutOfMemoryError."""
    model = _resolve(name, options)
    drafting = _drafting_seconds(model, options)
    for part in (_plain(model, options, bandwidth), _trees(model, options, bandwidth, drafting)):
        yield from part
        gc.collect()  # the engine is gone, and its cache with it


def measure_attention_of(name: str, options: GpuBenchOptions, bandwidth: Bandwidth) -> Iterator[Attended]:
    """Attention of one model's heads, by every backend. Raises as `measure_steps_of` does."""
    model = _resolve(name, options)
    blocks = num_blocks(options, _BLOCK_SIZE)
    cache = KVCache(model.decoder, blocks, _BLOCK_SIZE, model.dtype, model.device, stored=model.stored)
    for one in compare_attention(model.decoder, cache, options, profile_family(), bandwidth):
        yield replace(one, facts={"model": name, **one.facts})


def _resolve(name: str, options: GpuBenchOptions) -> _Model:
    device = hardware.resolve_device(options.device)
    dtype = hardware.resolve_dtype(options.dtype, device)
    heads_dir = None
    if name in SHAPES:
        decoder, load = SHAPES[name], partial(random_decoder, name, dtype, device)
    else:
        resolved = resolve_model(DEFAULT_MODEL if name == "default" else name)
        heads_dir = resolve_heads("auto", resolved)
        decoder = load_config(resolved.model_dir)
        load = partial(load_decoder, resolved.model_dir, dtype, device)
    room = _ROOM + 4 * (options.steps + WARM_UP_STEPS)  # some guesses are right
    longest = min(max(options.contexts) + room, decoder.max_positions)
    requests = max(options.requests)
    stored = stored_dtype(options.kv_cache_dtype, dtype)
    num_blocks = requests * -(-longest // _BLOCK_SIZE)
    config = EngineConfig(
        model_dir="",
        device=options.device,
        dtype=options.dtype,
        quantization=options.quantization,
        kv_cache_dtype=options.kv_cache_dtype,
        kv_cache_memory=num_blocks * _BLOCK_SIZE * bytes_per_token(decoder, stored),
        block_size=_BLOCK_SIZE,
        max_model_len=longest,
        max_num_seqs=requests,
        max_num_batched_tokens=requests * _ROOM,
    )
    return _Model(name, config, decoder, load, device, dtype, stored, heads_dir)


def _found(model: _Model, measured: Measured, context: int, **facts: object) -> Found:
    facts = {"model": model.name, "context": context, **facts}
    return Found(measured, context * model.token_bytes, facts)


def _plain(model: _Model, options: GpuBenchOptions, bandwidth: Bandwidth) -> Iterator[Found]:
    engine = build(replace(model.config, speculation="off"), loaded=model.load())
    for context in options.contexts:
        for requests in options.requests:
            bandwidth.measure()
            measured = measure_steps(engine, "plain", requests, context, options.steps)
            idle = _idle_share(engine, model.device, measured, context, options.steps)
            yield _found(model, measured, context, nodes=1, idle_share=idle)


def _idle_share(
    engine: Engine, device: torch.device, measured: Measured, context: int, num_steps: int
) -> float | None:
    """Share of a step in which nothing runs on the device; None where there is none beside the host. Its busy
    time comes from a profile, the step's from the runs without: profiling slows down the host alone."""
    with decoding(engine, "profiled", measured.num_requests, context, num_steps) as step:
        busy = busy_seconds(device, lambda: [step() for _ in range(num_steps)])
    if busy is None:
        return None
    return round(max(0.0, 1.0 - busy / num_steps / statistics.median(measured.seconds)), 4)


def _trees(
    model: _Model, options: GpuBenchOptions, bandwidth: Bandwidth, drafting: dict[int, float]
) -> Iterator[Found]:
    sizes = [nodes for nodes in options.nodes if nodes > 1]
    if not sizes:
        return
    family = profile_family()
    engine = build(
        model.config,
        loaded=model.load(),
        drafter=FreeDrafter(family, model.decoder.vocab_size, model.device),
        family=family,
        fixed_drafts=MAX_DRAFT_NODES,
    )
    for context in options.contexts:
        for requests in options.requests:
            for nodes in sizes:
                limit = SpeculationParams(max_nodes=nodes - 1)
                bandwidth.measure()
                measured = measure_steps(engine, f"tree {nodes}", requests, context, options.steps, limit)
                ms = round(1000 * drafting[requests], 3)
                yield _found(model, measured, context, nodes=nodes, ms_drafting=ms)


def _drafting_seconds(model: _Model, options: GpuBenchOptions) -> dict[int, float]:
    """What heads take to guess a tree, by the number of requests: the model's own, else untrained ones."""
    loaded = model.load()
    if model.heads_dir is None:
        drafter = HeadsDrafter(random_heads(loaded), loaded.lm_head.weight)
    else:
        drafter = HeadsDrafter.of(load_heads(model.heads_dir), loaded.embedding, loaded.lm_head.weight)
    most = max(options.requests)
    limits = BatchLimits(most, most * _ROOM, model.decoder.max_positions, MAX_DRAFT_NODES)
    num_blocks = most * (4 * _ROOM // _BLOCK_SIZE)
    cache = KVCache(
        model.decoder, num_blocks, _BLOCK_SIZE, model.dtype, model.device, drafter.num_cache_layers
    )
    costs = measure_costs(Runner(loaded, cache, drafter, most), limits)
    levels = np.full(len(options.requests), drafter.num_levels)
    seconds = costs.guessing_seconds(np.array(options.requests), levels)
    return dict(zip(options.requests, map(float, seconds), strict=True))
