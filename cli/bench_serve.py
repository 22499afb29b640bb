"""`gorgon bench serve`: load on a running server."""

from __future__ import annotations

import argparse
import os

from cli.bench_common import add_prompts, check_positive
from cli.parser import Subparsers
from cli.settings import client_api_key

DEFAULT_CONCURRENCY = (1, 4, 16)


def register(commands: Subparsers[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "serve",
        help="closed- or open-loop load on a running server",
        description="Keeps a number of requests running against any OpenAI-compatible server, or sends them "
        "at random times at a given rate, and prints throughput, time to first token and time per token.",
    )
    parser.add_argument(
        "--url", default="http://127.0.0.1:8000", metavar="URL", help="server (default: %(default)s)"
    )
    parser.add_argument(
        "--api-key",
        default=client_api_key(os.environ),
        metavar="TEXT",
        help="the server's key (default: GORGON_API_KEY)",
    )
    parser.add_argument("--model", metavar="TEXT", help="model name (default: the first the server lists)")
    levels = parser.add_mutually_exclusive_group()
    levels.add_argument(
        "--concurrency",
        type=int,
        nargs="+",
        default=list(DEFAULT_CONCURRENCY),
        metavar="N",
        help="closed loop: levels to measure, one after the other "
        f"(default: {' '.join(map(str, DEFAULT_CONCURRENCY))})",
    )
    levels.add_argument(
        "--rate",
        type=float,
        nargs="+",
        default=[],
        metavar="R",
        help="open loop: requests per second that arrive as a Poisson process, level after level",
    )
    parser.add_argument(
        "--num-requests", type=int, default=32, metavar="N", help="requests per level (default: 32)"
    )
    add_prompts(parser)
    parser.add_argument(
        "--input-len", type=int, metavar="N", help="made-up prompts of N tokens instead of --prompts"
    )
    parser.add_argument(
        "--output-len",
        type=int,
        metavar="N",
        help="answers of exactly N tokens: ignores end-of-text on servers that know ignore_eos",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from bench.prompts import BUILTIN
    from bench.serve import ServeBenchOptions
    from bench.serve import run as run_bench
    from engine.errors import ConfigError

    optional = [name for name in ("input_len", "output_len") if getattr(args, name) is not None]
    check_positive(args, "num_requests", "max_tokens", "concurrency", *optional)
    if min(args.rate, default=1.0) <= 0:
        raise ConfigError("rate", "must be more than 0 requests per second")
    if args.input_len is not None and args.prompts is not None:
        raise ConfigError("input_len", "makes prompts up; leave out --prompts")
    return run_bench(
        ServeBenchOptions(
            url=args.url.rstrip("/").removesuffix("/v1"),
            api_key=args.api_key,
            model=args.model,
            prompts=args.prompts or BUILTIN,
            num_requests=args.num_requests,
            concurrency=tuple(args.concurrency),
            rates=tuple(args.rate),
            input_len=args.input_len,
            output_len=args.output_len,
            max_tokens=args.max_tokens,
            seed=args.prompt_seed,
        )
    )
