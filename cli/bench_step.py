"""`gorgon bench step`: the engine's step against the memory limit."""

from __future__ import annotations

import argparse

from cli.bench_common import DEFAULT_KV_CACHE, check_positive, engine_settings
from cli.parser import Subparsers
from cli.settings import add_flags, build
from heads.defaults import DEFAULT_MODEL

DEFAULT_REQUESTS = (1, 2, 4, 8, 16, 32, 64)
DEFAULT_TREES = (2, 4, 8, 16, 32, 64)


def register(commands: Subparsers[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "step",
        help="time of a step by its tokens, against the memory limit",
        description="Times decoding steps of the engine in this process, plain and with draft trees, and "
        "says how far each is from the time that reading the weights and the cache takes at the least.",
    )
    parser.add_argument("--model", default=DEFAULT_MODEL, metavar="MODEL", help="(default: %(default)s)")
    parser.add_argument("--heads", default="auto", metavar="TEXT", help="head set (default: auto)")
    parser.add_argument(
        "--requests",
        type=int,
        nargs="*",
        default=list(DEFAULT_REQUESTS),
        metavar="N",
        help=f"requests that decode plainly (default: {' '.join(map(str, DEFAULT_REQUESTS))})",
    )
    parser.add_argument(
        "--trees",
        type=int,
        nargs="*",
        default=list(DEFAULT_TREES),
        metavar="N",
        help="nodes of one request's tree, root included "
        f"(default: {' '.join(map(str, DEFAULT_TREES))}; none where nothing drafts)",
    )
    parser.add_argument(
        "--context", type=int, default=128, metavar="N", help="tokens behind each request (default: 128)"
    )
    parser.add_argument("--steps", type=int, default=30, metavar="N", help="measured steps (default: 30)")
    add_flags(parser, engine_settings())
    parser.set_defaults(run=run, speculation=None, seed=None)


def run(args: argparse.Namespace) -> int:
    from bench.step import StepBenchOptions
    from bench.step import run as run_bench
    from engine.config import EngineConfig

    check_positive(args, "requests", "trees", "context", "steps")
    return run_bench(
        StepBenchOptions(
            model=args.model,
            heads=args.heads,
            config=build(EngineConfig, args, {}, model_dir="", kv_cache_memory=DEFAULT_KV_CACHE),
            requests=tuple(args.requests),
            trees=tuple(args.trees),
            context=args.context,
            steps=args.steps,
        )
    )
