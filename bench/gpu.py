"""`gorgon bench gpu`: the step on a GPU beside the memory limit, for Llama-shaped models with random weights.

They draft with untrained heads. Their guesses are worthless, but they cost what trained ones do. With
`--device cpu --shapes tiny` all of it runs in seconds, on any machine.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from dataclasses import asdict
from itertools import product
from typing import Any

import torch

from bench.bandwidth import Bandwidth
from bench.facts import machine_facts
from bench.gpu_model import GpuBenchOptions, GpuModel
from bench.report import print_json
from bench.steps import Kind, Measured, compare, figures_of, measure, print_steps
from engine.errors import GorgonError
from engine.runner.device import resolve_device


def run(options: GpuBenchOptions) -> int:
    device = resolve_device(options.device)
    bandwidth = Bandwidth(device)
    measured: list[tuple[str, int, Measured]] = []  # model, bytes of the cache for each position, steps
    failed: dict[str, str] = {}
    for name in options.shapes:
        try:
            model = GpuModel.resolve(name, options)
            measured.extend((name, model.token_bytes, row) for row in _measure(model, options, bandwidth))
        except (GorgonError, RuntimeError) as error:  # torch raises the last
            failed[name] = str(error)
            print(f"{name} was not measured to the end: {error}", file=sys.stderr)
    rows: list[dict[str, Any]] = [
        {"model": name, **figures_of(row, token_bytes, bandwidth.best)} for name, token_bytes, row in measured
    ]
    compare(rows)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    print(f"{gpu or 'CPU'}: {bandwidth.sentence}\n")
    print_steps(rows)
    print_json(
        {
            "bench": "gpu",
            **machine_facts(),
            **asdict(options),
            "gpu": gpu,
            "device": str(device),
            "threads": torch.get_num_threads(),
            **bandwidth.facts,
            "steps": rows,
            "num_steps": options.steps,
            "not_measured": failed,
        }
    )
    return 1 if failed else 0


def _measure(model: GpuModel, options: GpuBenchOptions, bandwidth: Bandwidth) -> Iterator[Measured]:
    """All steps of one model, plain ones first."""
    trees = [nodes for nodes in options.nodes if nodes > 1]
    for sizes, make_engine in (([1], model.plain_engine), (trees, model.tree_engine)):
        loads = product(options.contexts, options.requests, sizes)
        if kinds := [Kind(requests, nodes, context) for context, requests, nodes in loads]:
            yield from measure(make_engine(), kinds, options.steps, bandwidth)
            gc.collect()  # the engine is gone, and its cache goes with it
