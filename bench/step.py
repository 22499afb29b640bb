"""`gorgon bench step`: the time of the engine's step by its number of tokens, beside the memory limit.

A pass has to read every weight once, and the keys and values of every request's context; at the bandwidth
that is measured between the passes, this takes a time no engine can go below. Steps are whole ones: schedule,
execute and update.
"""

from __future__ import annotations

import gc
import random
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench.bandwidth import Bandwidth
from bench.facts import machine_facts
from bench.report import print_json, print_table
from engine.backends.kv_cache import bytes_per_token
from engine.build import build
from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import ConfigError, GorgonError
from engine.folders import with_folders
from engine.messages import AddRequest, SamplingParams, SpeculationParams, StepStats
from engine.model.loader import load_config

WARM_UP_STEPS = 3
NO_LIMIT = SpeculationParams()


class StepBenchError(GorgonError):
    """The engine did not run the steps that were asked for."""


@dataclass(frozen=True, kw_only=True)
class StepBenchOptions:
    """`requests`: numbers of requests that decode one token each, without speculation. `trees`: sizes of the
    tree of a single request, root included. `context`: tokens that each request has behind it."""

    model: str
    heads: str
    config: EngineConfig  # without folders
    requests: tuple[int, ...]
    trees: tuple[int, ...]
    context: int
    steps: int


@dataclass(frozen=True)
class Measured:
    """Steps of one kind, in seconds. `num_tokens`: tokens in the pass, the mean where steps differ."""

    kind: str
    num_requests: int
    num_tokens: float
    seconds: tuple[float, ...]
    weight_bytes: int


def run(options: StepBenchOptions) -> int:
    _check(options)
    model, config = with_folders(options.config, options.model, options.heads)
    plain = build(replace(config, speculation="off"))
    bandwidth = Bandwidth(torch.device(plain.info.device))
    rows = []
    for measured in measure(plain, config, options):
        bandwidth.measure()
        rows.append(measured)
    dtype = getattr(torch, plain.info.kv_cache_dtype or plain.info.dtype)
    kv_bytes = bytes_per_token(load_config(Path(config.model_dir)), dtype) * options.context
    figures = [figures_of(row, kv_bytes, bandwidth.best) for row in rows]
    _print(figures, bandwidth, plain)
    print_json(
        {
            "bench": "step",
            **machine_facts(),
            "model": model.name,
            "dtype": plain.info.dtype,
            "device": plain.info.device,
            "threads": torch.get_num_threads(),
            "context": options.context,
            "read_bytes_per_second": round(bandwidth.read),
            "copy_bytes_per_second": round(bandwidth.copy),
            "steps": figures,
        }
    )
    return 0


def _check(options: StepBenchOptions) -> None:
    """Raises ConfigError for what the engine would not run as asked, before anything is loaded."""
    if max(options.requests, default=1) > options.config.max_num_seqs:
        raise ConfigError("requests", f"must be at most {options.config.max_num_seqs}, --max-num-seqs")
    if max(options.trees, default=2) > options.config.max_tree_nodes:
        raise ConfigError("trees", f"must be at most {options.config.max_tree_nodes}, --max-tree-nodes")
    if min(options.trees, default=2) < 2:
        raise ConfigError("trees", "must be at least 2 nodes, the root and one draft token")


def measure(plain: Engine, config: EngineConfig, options: StepBenchOptions) -> Iterator[Measured]:
    """One kind of step after the other. Trees are left out for a model that has nothing to draft with.

    A tree of each size needs an engine of its own, which is loaded for it and dropped after.
    """
    for count in options.requests:
        yield measure_steps(plain, "plain", count, options.context, options.steps)
    for nodes in options.trees:
        engine = build(replace(config, speculation="auto"), fixed_drafts=nodes - 1)
        if engine.info.max_tree_nodes < 2:
            return
        yield measure_steps(engine, f"tree of {nodes}", 1, options.context, options.steps)
        del engine
        gc.collect()


def measure_steps(
    engine: Engine,
    kind: str,
    num_requests: int,
    context: int,
    num_steps: int,
    speculation: SpeculationParams = NO_LIMIT,
) -> Measured:
    """Time steps in which all requests decode; their answers are thrown away.

    Raises StepBenchError where requests end, are preempted or do not all run at once, and RequestError where
    the model cannot have that much context.
    """
    with decoding(engine, kind, num_requests, context, num_steps, speculation) as step:
        stats = [step() for _ in range(num_steps)]
    tokens = sum(s.num_tokens for s in stats)
    seconds = tuple(s.duration for s in stats)
    return Measured(kind, num_requests, tokens / num_steps, seconds, engine.weight_bytes())


@contextmanager
def decoding(
    engine: Engine,
    kind: str,
    num_requests: int,
    context: int,
    num_steps: int,
    speculation: SpeculationParams = NO_LIMIT,
) -> Iterator[Callable[[], StepStats]]:
    """Warmed up requests that all decode, for up to as many calls of the step function that it gives. Raises
    as `measure_steps` does."""
    generator = random.Random(0)  # prompts of their own, so that no two requests share blocks
    # An accepted tree takes many tokens a step, and no request may end before the steps are counted.
    max_tokens = min(64 * (num_steps + WARM_UP_STEPS), engine.info.max_model_len - context)
    sampling = SamplingParams(
        max_tokens=max_tokens, temperature=0.0, ignore_eos=True, speculation=speculation
    )
    names = [f"{kind}-{index}" for index in range(num_requests)]
    for name in names:
        prompt = [generator.randrange(engine.info.vocab_size) for _ in range(context)]
        engine.add_request(AddRequest(request_id=name, prompt_token_ids=prompt, sampling=sampling))
    started: set[str] = set()
    while len(started) < num_requests:
        started |= {output.request_id for output in engine.step().outputs if output.token_ids}

    def step() -> StepStats:
        stats = engine.step().stats
        if stats.num_running != num_requests or len(stats.committed_tokens) != num_requests:
            raise StepBenchError(
                f"{len(stats.committed_tokens)} of {num_requests} requests decoded in a step; raise "
                "--kv-cache-memory, or ask for fewer --requests, fewer --steps or a shorter --context"
            )
        return stats

    try:
        for _ in range(WARM_UP_STEPS):
            step()
        yield step
    finally:
        for name in names:
            engine.abort(name)


def figures_of(row: Measured, kv_bytes: int, bandwidth: float) -> dict[str, Any]:
    """Times beside the memory limit. kv_bytes: of one request's context; bandwidth: bytes per second."""
    read = row.weight_bytes + row.num_requests * kv_bytes
    median = statistics.median(row.seconds)
    return {
        "kind": row.kind,
        "requests": row.num_requests,
        "tokens": round(row.num_tokens, 2),
        "ms_median": round(1000 * median, 3),
        "ms_best": round(1000 * min(row.seconds), 3),
        "bytes": read,
        "limit_ms": round(1000 * read / bandwidth, 3),
        "share_of_limit": round(read / bandwidth / median, 4),
    }


def _print(figures: list[dict[str, Any]], bandwidth: Bandwidth, engine: Engine) -> None:
    print(
        f"{engine.info.dtype} on {engine.info.device}: a pass reads {engine.weight_bytes() / 1e6:.1f} MB of "
        f"weights; memory reads {bandwidth.read / 1e9:.1f} GB/s, copies {bandwidth.copy / 1e9:.1f} GB/s\n"
    )
    print_table(
        ["step", "requests", "tokens", "ms", "best ms", "limit ms", "of the limit", "tokens/s"],
        [
            [
                row["kind"],
                row["requests"],
                row["tokens"],
                row["ms_median"],
                row["ms_best"],
                row["limit_ms"],
                f"{row['share_of_limit']:.0%}",
                1000 * row["tokens"] / row["ms_median"],
            ]
            for row in figures
        ],
    )
