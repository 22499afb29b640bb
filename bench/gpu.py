"""`gorgon bench gpu`: the engine's step on a GPU beside the memory limit, for the default model and for
Llama-shaped models with random weights.

The limit of a pass is the time to read every weight and the keys and values of every request's context once,
at the bandwidth of copies measured in the same run. Nothing here needs a GPU but its clocks: with
`--device cpu --shapes tiny` all of it runs in seconds.
"""

from __future__ import annotations

import gc
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from bench.bandwidth import Bandwidth
from bench.device_profile import profile_device
from bench.facts import machine_facts
from bench.gpu_model import GpuBenchOptions, GpuModel
from bench.report import print_json, print_table
from bench.step import NO_LIMIT, Measured, decoding, figures_of, measure_steps
from engine.engine import Engine
from engine.errors import GorgonError
from engine.messages import SpeculationParams
from engine.runner.device import resolve_device
from heads.errors import HeadsError, RegistryError

_LISTED_KERNELS = 8  # those that take the most time


@dataclass(frozen=True)
class Found:
    """Steps of one kind. `facts`: the rest of its row."""

    measured: Measured
    kv_bytes: int  # of each request's context
    facts: dict[str, Any]


def run(options: GpuBenchOptions) -> int:
    device = resolve_device(options.device)
    bandwidth = Bandwidth(device)
    found: list[Found] = []
    failed: dict[str, str] = {}
    for name in options.shapes:
        try:
            found.extend(measure(name, options, bandwidth))
        except (GorgonError, HeadsError, RegistryError, RuntimeError) as error:  # torch raises the last
            failed[name] = str(error)
            print(f"{name} was not measured to the end: {error}", file=sys.stderr)
    rows = [{**one.facts, **figures_of(one.measured, one.kv_bytes, bandwidth.copy)} for one in found]
    compare(rows)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    speeds = f"reads {bandwidth.read / 1e9:.1f} GB/s, copies {bandwidth.copy / 1e9:.1f} GB/s"
    print(f"{gpu or 'CPU'}: memory {speeds}\n")
    _print(rows)
    print_json(
        {
            "bench": "gpu",
            **machine_facts(),
            **asdict(options),
            "gpu": gpu,
            "device": str(device),
            "threads": torch.get_num_threads(),
            "read_bytes_per_second": round(bandwidth.read),
            "copy_bytes_per_second": round(bandwidth.copy),
            "rows": rows,
            "not_measured": failed,
        }
    )
    return 1 if failed else 0


def measure(name: str, options: GpuBenchOptions, bandwidth: Bandwidth) -> Iterator[Found]:
    """All steps of one model, plain ones first, the bandwidth in between. Raises GorgonError, RegistryError
    or HeadsError where the model cannot be had or does not fit, and OutOfMemoryError."""
    model = GpuModel.resolve(name, options)
    trees = [nodes for nodes in options.nodes if nodes > 1]
    drafting = model.drafting_seconds(options.requests) if trees else {}
    for sizes, make_engine in (([1], model.plain_engine), (trees, model.tree_engine)):
        if not sizes:
            continue
        for measured, facts in _measure_engine(make_engine(), sizes, options, bandwidth):
            if facts["nodes"] > 1:
                facts["ms_drafting"] = round(1000 * drafting[measured.num_requests], 3)
            yield Found(measured, facts["context"] * model.token_bytes, {"model": name, **facts})
        gc.collect()  # the engine is gone, and its cache with it


def _measure_engine(
    engine: Engine, sizes: Sequence[int], options: GpuBenchOptions, bandwidth: Bandwidth
) -> Iterator[tuple[Measured, dict[str, Any]]]:
    for context in options.contexts:
        for requests in options.requests:
            for nodes in sizes:
                bandwidth.measure()
                yield _measure_kind(engine, nodes, requests, context, options.steps)


def _measure_kind(
    engine: Engine, nodes: int, requests: int, context: int, steps: int
) -> tuple[Measured, dict[str, Any]]:
    """Steps of one kind, and what the device does meanwhile."""
    kind = "plain" if nodes == 1 else f"tree {nodes}"
    limit = NO_LIMIT if nodes == 1 else SpeculationParams(max_nodes=nodes - 1)
    measured = measure_steps(engine, kind, requests, context, steps, limit)
    with decoding(engine, "profiled", requests, context, steps, limit) as step:
        profile = profile_device(torch.device(engine.info.device), lambda: [step() for _ in range(steps)])
    facts: dict[str, Any] = {"context": context, "nodes": nodes}
    if profile is not None:
        waits = 1.0 - profile.busy / steps / statistics.median(measured.seconds)
        longest = profile.by_kernel.most_common(_LISTED_KERNELS)
        facts["idle_share"] = round(max(0.0, waits), 4)
        facts["ms_by_kernel"] = {name: round(1000 * seconds / steps, 4) for name, seconds in longest}
    return measured, facts


def compare(rows: list[dict[str, Any]]) -> None:
    """Put each step of trees beside the plain one of the same load: the ratio of their times."""
    plain = {_load(row): row["ms_median"] for row in rows if row["nodes"] == 1}
    for row in rows:
        if row["nodes"] > 1:
            row["over_plain"] = round(row["ms_median"] / plain[_load(row)], 3)


def _load(row: dict[str, Any]) -> tuple[str, int, int]:
    return row["model"], row["requests"], row["context"]


def _print(rows: list[dict[str, Any]]) -> None:
    columns = {
        "model": "model", "step": "kind", "requests": "requests", "context": "context", "ms": "ms_median",
        "best ms": "ms_best", "limit ms": "limit_ms", "share of limit": "share_of_limit",
        "over plain": "over_plain", "device waits": "idle_share", "drafting ms": "ms_drafting",
    }  # fmt: skip
    print_table(list(columns), [[row.get(key) for key in columns.values()] for row in rows])
