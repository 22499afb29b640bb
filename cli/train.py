"""`gorgon train medusa1|medusa2|calibrate|overlap`: make head sets from a model's own text, measure one."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from cli import overlap, train_medusa1, train_medusa2
from cli.parser import Subparsers
from cli.serve import DEFAULT_MODEL


def register(subparsers: Subparsers[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("train", help="train and calibrate head sets")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    train_medusa1.register(commands, DEFAULT_MODEL, _positive, _positive_float)
    train_medusa2.register(commands, DEFAULT_MODEL, _positive, _positive_float)

    parser = commands.add_parser("calibrate", help="measure a head set on held-out text, rewrite its tree")
    _add_common(parser)
    parser.add_argument("--heads", type=Path, required=True, metavar="DIR", help="the head set")
    parser.set_defaults(run=run_calibrate)

    overlap.register(commands)


def _add_common(parser: argparse.ArgumentParser) -> None:
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
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="order of the text (0)")


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _positive_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def run_calibrate(args: argparse.Namespace) -> int:
    from training.recipe import calibrate_heads, report

    _check_data(args.data)
    cache = args.cache or args.heads / "cache"
    print("\n".join(report(calibrate_heads(args.heads, args.model, args.data, cache, args.seed))))
    return 0


def _check_data(data: Path) -> None:
    from engine.errors import ConfigError

    if not data.is_file():
        raise ConfigError("data", f"{data} is no file")
