"""`gorgon bench peers`: our server beside others."""

from __future__ import annotations

import argparse

from cli.bench_common import add_prompts, check_positive
from cli.parser import Subparsers
from heads.defaults import DEFAULT_MODEL

DEFAULT_CONCURRENCY = (1, 4, 16, 40)


def register(commands: Subparsers[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "peers",
        help="our server beside llama.cpp, vLLM and transformers",
        description="Installs each peer in an environment of its own in the cache folder, starts all servers "
        "with the same model on this machine and runs the same load on them, taking turns, on CPU. "
        "GORGON_ variables set our own server.",
    )
    parser.add_argument("--model", default=DEFAULT_MODEL, metavar="MODEL", help="(default: %(default)s)")
    parser.add_argument(
        "--peers", nargs="+", default=[], metavar="NAME", help="only these; a wrong name lists them"
    )
    parser.add_argument(
        "--concurrency",
        type=int,
        nargs="+",
        default=list(DEFAULT_CONCURRENCY),
        metavar="N",
        help=f"requests at once (default: {' '.join(map(str, DEFAULT_CONCURRENCY))})",
    )
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="turns of each (default: 3)")
    parser.add_argument(
        "--time-limit",
        type=float,
        default=120.0,
        metavar="S",
        help="seconds for one server at one level of one round; the rest is cut off (default: 120)",
    )
    add_prompts(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from bench.peers.run import PeersOptions
    from bench.peers.run import run as run_bench
    from bench.prompts import BUILTIN

    check_positive(args, "concurrency", "rounds", "max_tokens", "time_limit")
    return run_bench(
        PeersOptions(
            model=args.model,
            peers=tuple(args.peers),
            prompts=args.prompts or BUILTIN,
            concurrency=tuple(args.concurrency),
            rounds=args.rounds,
            max_tokens=args.max_tokens,
            time_limit=args.time_limit,
            seed=args.prompt_seed,
        )
    )
