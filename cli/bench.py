"""`gorgon bench engine|serve|host|quality|linears`: the engine in this process, a server over HTTP, the
scheduler alone, what number formats cost in answers and save in time."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from cli.parser import Subparsers
from cli.serve import DEFAULT_MODEL
from cli.settings import Setting, add_flags, build, settings_of

DEFAULT_KV_CACHE = 2**30  # several engines share the memory
DEFAULT_ROUNDS = 3


def register(subparsers: Subparsers[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "bench",
        help="measure the engine, or a server",
        description="Every benchmark prints tables and, as its last line, JSON.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _register_engine(commands)
    _register_serve(commands)
    _register_host(commands)
    _register_quality(commands)
    _register_linears(commands)


def _engine_settings() -> list[Setting]:
    from engine.config import EngineConfig

    # Speculation is what is compared, and the seed of greedy requests draws nothing.
    return [s for s in settings_of(EngineConfig) if s.name not in ("speculation", "seed")]


def _register_engine(commands: Subparsers[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "engine",
        help="speculation on against off in this process",
        description="Answers the same prompts greedily with speculation auto and off, taking turns prompt by "
        "prompt (or, with --concurrency, round by round), and prints ratios.",
    )
    parser.add_argument("--model", default=DEFAULT_MODEL, metavar="MODEL", help="(default: %(default)s)")
    parser.add_argument("--heads", default="auto", metavar="TEXT", help="head set (default: auto)")
    _add_prompts(parser)
    parser.add_argument(
        "--num-prompts", type=int, default=24, metavar="N", help="prompts, evenly over tasks (default: 24)"
    )
    parser.add_argument(
        "--tree-nodes",
        type=int,
        action="append",
        default=[],
        metavar="N",
        help="also measure a tree of always N draft tokens; may be repeated",
    )
    parser.add_argument(
        "--transformers", action="store_true", help="also measure transformers, one request at a time"
    )
    parser.add_argument(
        "--concurrency", type=int, default=1, metavar="N", help="requests at once (default: 1)"
    )
    parser.add_argument(
        "--rounds", type=int, metavar="N", help=f"rounds with --concurrency (default: {DEFAULT_ROUNDS})"
    )
    add_flags(parser, _engine_settings())
    parser.set_defaults(run=run_engine, speculation=None, seed=None)


def _register_serve(commands: Subparsers[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "serve",
        help="closed-loop load on a running server",
        description="Keeps a number of requests running against any OpenAI-compatible server.",
    )
    parser.add_argument(
        "--url", default="http://127.0.0.1:8000", metavar="URL", help="server (default: %(default)s)"
    )
    parser.add_argument(
        "--api-key",
        default=os.environ.get("GORGON_API_KEY"),
        metavar="TEXT",
        help="the server's key (default: GORGON_API_KEY)",
    )
    parser.add_argument("--model", metavar="TEXT", help="model name (default: the first the server lists)")
    parser.add_argument(
        "--concurrency",
        type=int,
        nargs="+",
        default=[1, 4, 16],
        metavar="N",
        help="levels to measure, one after the other (default: 1 4 16)",
    )
    parser.add_argument(
        "--num-requests", type=int, default=32, metavar="N", help="requests per level (default: 32)"
    )
    _add_prompts(parser)
    parser.set_defaults(run=run_serve)


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


def _register_quality(commands: Subparsers[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "quality",
        help="what quantized weights cost in answers",
        description="Compares --quantization none, int8 and int4 with float32: perplexity of the prompts' "
        "text, agreement of greedy answers, and whether speculation changes them.",
    )
    parser.add_argument("--model", default=DEFAULT_MODEL, metavar="MODEL", help="(default: %(default)s)")
    parser.add_argument("--heads", default="auto", metavar="TEXT", help="head set (default: auto)")
    _add_prompts(parser, max_tokens=64)
    parser.add_argument(
        "--num-prompts", type=int, default=16, metavar="N", help="prompts, evenly over tasks (default: 16)"
    )
    parser.add_argument(
        "--quantization",
        nargs="+",
        choices=("none", "int8", "int4"),
        default=["none", "int8", "int4"],
        help="what to compare (default: all)",
    )
    parser.set_defaults(run=run_quality)


def _register_linears(commands: Subparsers[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("linears", help="time of the model's matrices by number format")
    parser.add_argument("--model", default=DEFAULT_MODEL, metavar="MODEL", help="(default: %(default)s)")
    parser.set_defaults(run=run_linears)


def _add_prompts(parser: argparse.ArgumentParser, max_tokens: int = 128) -> None:
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help='JSONL with "messages" and "task"; first user turns are asked (default: 24 prompts of our own)',
    )
    parser.add_argument(
        "--max-tokens", type=int, default=max_tokens, metavar="N", help="per answer (default: %(default)s)"
    )
    parser.add_argument(
        "--prompt-seed", type=int, default=0, metavar="N", help="which prompts are drawn (default: 0)"
    )


def _check(args: argparse.Namespace, *names: str) -> None:
    """Refuse numbers below one: nothing would be measured."""
    from engine.errors import ConfigError

    for name in names:
        value = getattr(args, name)
        if min(value if isinstance(value, list) else [value], default=1) < 1:
            raise ConfigError(name, "must be at least 1")


def run_engine(args: argparse.Namespace) -> int:
    from bench.inprocess import EngineBenchOptions, run
    from bench.prompts import BUILTIN
    from engine.config import EngineConfig
    from engine.errors import ConfigError

    rounds = [] if args.rounds is None else ["rounds"]
    _check(args, "num_prompts", "max_tokens", "concurrency", "tree_nodes", *rounds)
    if args.concurrency > 1 and args.transformers:
        raise ConfigError("transformers", "answers one request at a time; leave out --concurrency")
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
            seed=args.prompt_seed,
            tree_nodes=tuple(args.tree_nodes),
            transformers=args.transformers,
            concurrency=args.concurrency,
            rounds=args.rounds or DEFAULT_ROUNDS,
        )
    )


def run_serve(args: argparse.Namespace) -> int:
    from bench.http import ServeBenchOptions, run
    from bench.prompts import BUILTIN

    _check(args, "num_requests", "max_tokens", "concurrency")
    return run(
        ServeBenchOptions(
            url=args.url.rstrip("/").removesuffix("/v1"),
            api_key=args.api_key,
            model=args.model,
            prompts=args.prompts or BUILTIN,
            num_requests=args.num_requests,
            concurrency=tuple(args.concurrency),
            max_tokens=args.max_tokens,
            seed=args.prompt_seed,
        )
    )


def run_host(args: argparse.Namespace) -> int:
    from bench.host import run

    _check(args, "requests", "steps")
    return run(args.requests, args.steps)


def run_quality(args: argparse.Namespace) -> int:
    from bench.prompts import BUILTIN
    from bench.quality import QualityOptions, run

    _check(args, "num_prompts", "max_tokens")
    return run(
        QualityOptions(
            model=args.model,
            heads=args.heads,
            prompts=args.prompts or BUILTIN,
            num_prompts=args.num_prompts,
            max_tokens=args.max_tokens,
            seed=args.prompt_seed,
            formats=tuple(args.quantization),
        )
    )


def run_linears(args: argparse.Namespace) -> int:
    from bench.linears import run

    return run(args.model)
