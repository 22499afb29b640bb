"""`gorgon bench gpu`: the step on a GPU against the memory limit."""

from __future__ import annotations

import argparse
from typing import Any, get_args

from cli.bench_common import check_positive
from cli.parser import Subparsers

SHAPES = ("1b", "3b", "8b", "tiny")
NUMBERS = (
    ("requests", (1, 8, 64), "requests that decode at once"),
    ("nodes", (1, 2, 4, 8, 16, 32, 64), "nodes of each request's tree, root included; 1 is plain decoding"),
    ("contexts", (128, 2000), "tokens behind each request"),
)


def register(commands: Subparsers[argparse.ArgumentParser]) -> None:
    from engine.config import Device, Dtype, KVCacheDtype, Quantization

    parser = commands.add_parser(
        "gpu",
        help="time of a step on a GPU, by model size, requests, context and tree",
        description="Times decoding steps of Llama-shaped models with random weights, profiles the device "
        "meanwhile, and says how far each step is from the memory limit. With --device cpu --shapes tiny it "
        "runs anywhere. gorgon bench step does it for a real model.",
    )
    parser.add_argument(
        "--shapes",
        nargs="+",
        choices=SHAPES,
        default=list(SHAPES[:-1]),
        help="Llama's shapes, with random weights (default: all but tiny)",
    )
    for name, default, text in NUMBERS:
        shown = f"{text} (default: {' '.join(map(str, default))})"
        parser.add_argument(f"--{name}", type=int, nargs="+", default=list(default), metavar="N", help=shown)
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="measured steps (default: 20)")
    kinds: tuple[tuple[str, Any, str], ...] = (
        ("--device", Device, "auto"),
        ("--dtype", Dtype, "auto"),
        ("--quantization", Quantization, "none"),
        ("--kv-cache-dtype", KVCacheDtype, "auto"),
    )
    for flag, kind, chosen in kinds:
        parser.add_argument(flag, choices=get_args(kind), default=chosen, help=f"(default: {chosen})")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from bench.gpu import run as run_bench
    from bench.gpu_model import GpuBenchOptions

    check_positive(args, "requests", "nodes", "contexts", "steps")
    return run_bench(
        GpuBenchOptions(
            shapes=tuple(dict.fromkeys(args.shapes)),
            **{name: tuple(sorted(set(getattr(args, name)))) for name, *_ in NUMBERS},
            steps=args.steps,
            device=args.device,
            dtype=args.dtype,
            quantization=args.quantization,
            kv_cache_dtype=args.kv_cache_dtype,
        )
    )
