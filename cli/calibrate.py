"""`gorgon calibrate`: measures a head set on held-out text and makes its tree."""

from __future__ import annotations

import argparse
from pathlib import Path

from cli.parser import Subparsers
from heads.defaults import DEFAULT_MODEL

PLOT = "tree.png"


def register(subparsers: Subparsers[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "calibrate",
        help="measure a head set on held-out text, rewrite its tree",
        description="Measures how often each guess of a head set is right, by head, rank and task, on the "
        "held-out share of the text. Rewrites tree.json and the figures of the card, and draws tree.png.",
    )
    parser.add_argument("--heads", type=Path, required=True, metavar="DIR", help="the head set")
    parser.add_argument(
        "--model", default=DEFAULT_MODEL, metavar="MODEL", help=f"base model (default: {DEFAULT_MODEL})"
    )
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="FILE",
        help="conversations, .jsonl or .jsonl.gz; best what the model itself wrote",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="where hidden states are kept between runs (default: a folder in the head set's)",
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto is CUDA where there is one (auto)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="order of the text (0)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from engine.errors import ConfigError
    from training.calibration_report import independent_tokens, report
    from training.heads_recipe import calibrate_heads
    from training.plots import can_plot, plot_expected_tokens

    if not args.data.is_file():
        raise ConfigError("data", f"{args.data} is no file")
    if not args.heads.is_dir():
        raise ConfigError("heads", f"{args.heads} is no folder of a head set")
    cache = args.cache or args.heads / "cache"
    result = calibrate_heads(args.heads, args.model, args.data, cache, args.seed, args.device)
    print("\n".join(report(result)))
    print(f"\nThe tree: {args.heads / 'tree.json'}, {len(result.family.paths)} nodes")
    if can_plot():
        plot = args.heads / PLOT
        title = args.heads.resolve().name
        plot_expected_tokens(result.family, plot, result.tokens_per_step, independent_tokens(result), title)
        print(f"Expected tokens per step by nodes: {plot}")
    else:
        print("No plot without matplotlib: pip install 'gorgon-serve[report]'")
    print(f"Next, measure it at serving: gorgon evaluate --model {args.model} --heads {args.heads} --out DIR")
    return 0
