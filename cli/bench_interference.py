"""`gorgon bench interference`: long prompts beside running streams and short prompts."""

from __future__ import annotations

import argparse

from cli.bench_common import DEFAULT_KV_CACHE, check_positive, engine_settings
from cli.parser import Subparsers
from cli.settings import add_flags, build
from heads.defaults import DEFAULT_MODEL


def register(commands: Subparsers[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "interference",
        help="what long prompts do to running streams and to short prompts",
        description="Prints the usual and the worst gap between two outputs of running streams while long "
        "prompts arrive, the time to the first token of a short prompt behind a long one, and what keeping "
        "these short costs in total. The engine runs in this process.",
    )
    parser.add_argument("--model", default=DEFAULT_MODEL, metavar="MODEL", help="(default: %(default)s)")
    parser.add_argument("--heads", default="auto", metavar="TEXT", help="head set (default: auto)")
    for name, default, text in (
        ("streams", 2, "clients with answers that run meanwhile"),
        ("answers", 16, "of each such client, one after the other"),
        ("max-tokens", 128, "of each answer"),
        ("long-prompts", 3, "long prompts, one after the other"),
        ("prompt-tokens", 3000, "of each long prompt"),
        ("rounds", 2, "of all this with each engine, by turns"),
    ):
        shown = f"{text} (default: {default})"
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=shown)
    add_flags(parser, engine_settings())
    parser.set_defaults(run=run, speculation=None, seed=None)


def run(args: argparse.Namespace) -> int:
    from bench.interference import InterferenceOptions
    from bench.interference import run as run_bench
    from engine.config import EngineConfig

    numbers = ("streams", "answers", "max_tokens", "long_prompts", "prompt_tokens", "rounds")
    check_positive(args, *numbers)
    return run_bench(
        InterferenceOptions(
            model=args.model,
            heads=args.heads,
            config=build(EngineConfig, args, {}, model_dir="", kv_cache_memory=DEFAULT_KV_CACHE),
            **{name: getattr(args, name) for name in numbers},
        )
    )
