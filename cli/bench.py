"""`gorgon bench`: what it can measure; here, the engine in this process and the scheduler alone."""

from __future__ import annotations

import argparse

from cli import bench_gpu, bench_interference, bench_peers, bench_quality, bench_serve, bench_step
from cli.bench_common import DEFAULT_KV_CACHE, add_prompts, check_positive, engine_settings
from cli.parser import Subparsers
from cli.settings import add_flags, build
from heads.defaults import DEFAULT_MODEL

DEFAULT_ROUNDS = 3


def register(subparsers: Subparsers[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "bench",
        help="measure the engine, a server, or several side by side",
        description="Every benchmark prints tables and, as its last line, JSON.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _register_engine(commands)
    bench_serve.register(commands)
    bench_step.register(commands)
    bench_interference.register(commands)
    bench_gpu.register(commands)
    _register_host(commands)
    bench_quality.register(commands)
    bench_peers.register(commands)


def _register_engine(commands: Subparsers[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "engine",
        help="speculation on against off in this process",
        description="Answers the same prompts with speculation auto and off, taking turns prompt by "
        "prompt (or, with --concurrency, round by round), and prints ratios.",
    )
    parser.add_argument("--model", default=DEFAULT_MODEL, metavar="MODEL", help="(default: %(default)s)")
    parser.add_argument("--heads", default="auto", metavar="TEXT", help="head set (default: auto)")
    add_prompts(parser)
    parser.add_argument(
        "--num-prompts", type=int, default=24, metavar="N", help="prompts, evenly over tasks (default: 24)"
    )
    parser.add_argument(
        "--draft-tokens",
        "--tree-nodes",  # its name until now
        type=int,
        action="append",
        default=[],
        metavar="N",
        help="also measure a tree of always N draft tokens; may be repeated",
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="X", help="of all answers; 0 is greedy (default: 0)"
    )
    parser.add_argument(
        "--concurrency", type=int, default=1, metavar="N", help="requests at once (default: 1)"
    )
    parser.add_argument(
        "--rounds", type=int, metavar="N", help=f"rounds with --concurrency (default: {DEFAULT_ROUNDS})"
    )
    add_flags(parser, engine_settings())
    parser.set_defaults(run=run_engine, speculation=None, seed=None)


def _register_host(commands: Subparsers[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "host",
        help="time of schedule and update alone, without a model",
        description="Runs the scheduler on made-up results and prints milliseconds per step.",
    )
    parser.add_argument(
        "--requests", type=int, default=64, metavar="N", help="running requests (default: 64)"
    )
    parser.add_argument("--steps", type=int, default=500, metavar="N", help="measured steps (default: 500)")
    parser.set_defaults(run=run_host)


def run_engine(args: argparse.Namespace) -> int:
    from bench.engine import EngineBenchOptions, run
    from bench.prompts import BUILTIN
    from engine.config import EngineConfig
    from engine.errors import ConfigError

    rounds = [] if args.rounds is None else ["rounds"]
    check_positive(args, "num_prompts", "max_tokens", "concurrency", "draft_tokens", *rounds)
    if not 0.0 <= args.temperature <= 2.0:
        raise ConfigError("temperature", f"must be 0 to 2, not {args.temperature}")
    if args.concurrency == 1 and rounds:
        raise ConfigError("rounds", "one request at a time has no rounds; give --concurrency 2 or more")
    return run(
        EngineBenchOptions(
            model=args.model,
            heads=args.heads,
            config=build(EngineConfig, args, {}, model_dir="", kv_cache_memory=DEFAULT_KV_CACHE),
            prompts=args.prompts or BUILTIN,
            num_prompts=args.num_prompts,
            max_tokens=args.max_tokens,
            temperature=args.temperature,
            seed=args.prompt_seed,
            draft_tokens=tuple(args.draft_tokens),
            concurrency=args.concurrency,
            rounds=args.rounds or DEFAULT_ROUNDS,
        )
    )


def run_host(args: argparse.Namespace) -> int:
    from bench.host import run

    check_positive(args, "requests", "steps")
    return run(args.requests, args.steps)
