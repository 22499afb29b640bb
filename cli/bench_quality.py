"""`gorgon bench quality`: what number formats of the weights cost in answers."""

from __future__ import annotations

import argparse

from cli.bench_common import add_prompts, check_positive
from cli.parser import Subparsers
from heads.defaults import DEFAULT_MODEL


def register(commands: Subparsers[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "quality",
        help="what quantized weights cost in answers",
        description="Compares --quantization none, int8 and int4 with float32: perplexity of the prompts' "
        "text, agreement of greedy answers, and whether speculation changes them.",
    )
    parser.add_argument("--model", default=DEFAULT_MODEL, metavar="MODEL", help="(default: %(default)s)")
    parser.add_argument("--heads", default="auto", metavar="TEXT", help="head set (default: auto)")
    add_prompts(parser, max_tokens=64)
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
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from bench.prompts import BUILTIN
    from evaluation.quality import QualityOptions
    from evaluation.quality import run as run_bench

    check_positive(args, "num_prompts", "max_tokens")
    return run_bench(
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
