"""`gorgon train medusa1|medusa2|overlap`: make head sets from a model's own text."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from cli import overlap, train_medusa2
from cli.parser import Subparsers
from cli.serve import DEFAULT_MODEL


def register(subparsers: Subparsers[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("train", help="train head sets")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    parser = commands.add_parser("medusa1", help="train heads on a frozen model, then calibrate them")
    _add_common(parser)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="where the head set is written"
    )
    parser.add_argument(
        "--architecture",
        choices=("medusa", "hydra"),
        default="medusa",
        help="independent heads, or heads that see the tokens guessed before them (medusa)",
    )
    parser.add_argument(
        "--start", type=Path, metavar="DIR", help="head set to go on from; it decides on all sizes below"
    )
    parser.add_argument("--heads", type=_positive, default=4, metavar="N", help="tokens guessed ahead (4)")
    parser.add_argument(
        "--vocab", type=_positive, default=8192, metavar="N", help="most frequent tokens kept (8192)"
    )
    parser.add_argument(
        "--projection",
        choices=("shared", "own", "low_rank"),
        default="shared",
        help="onto the vocabulary: the model's, one for each head, or a small one of their own (shared)",
    )
    parser.add_argument(
        "--rank", type=_positive, default=128, metavar="N", help="of a low-rank projection (128)"
    )
    parser.add_argument(
        "--layers", type=_positive, default=3, metavar="N", help="medusa: blocks of each head (3)"
    )
    parser.add_argument(
        "--root-input",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="medusa: see the token just committed (default: yes; no is Medusa as published)",
    )
    parser.add_argument(
        "--prefix-width",
        type=_positive,
        default=0,
        metavar="N",
        help="hydra: inner size of the prefix layer (the model's hidden size)",
    )
    parser.add_argument(
        "--targets",
        choices=("soft", "hard"),
        default="soft",
        help="learn the model's whole distribution at every place, or the text's tokens (soft)",
    )
    parser.add_argument(
        "--epochs", type=_positive_float, default=2.0, metavar="X", help="passes over the text (2)"
    )
    parser.add_argument(
        "--max-positions", type=_positive, default=4_000_000, metavar="N", help="answer tokens used (4000000)"
    )
    parser.add_argument("--batch", type=_positive, default=1536, metavar="N", help="tokens in a step (1536)")
    parser.add_argument(
        "--lr", type=_positive_float, default=1.5e-3, metavar="X", help="highest learning rate (0.0015)"
    )
    parser.set_defaults(run=run_medusa1)

    train_medusa2.register(commands, DEFAULT_MODEL, _positive, _positive_float)

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


def run_medusa1(args: argparse.Namespace) -> int:
    from training.calibration_report import report
    from training.recipe import HeadsConfig, train_medusa1
    from training.trainer import TrainerConfig

    _check_data(args.data)
    heads = HeadsConfig(
        architecture=args.architecture,
        start=args.start,
        heads=args.heads,
        vocab=args.vocab,
        projection=args.projection,
        rank=args.rank,
        layers=args.layers,
        root_input=args.root_input,
        prefix_width=args.prefix_width,
    )
    config = TrainerConfig(
        targets=args.targets, epochs=args.epochs, batch=args.batch, lr=args.lr, seed=args.seed
    )
    cache = args.cache or args.out / "cache"
    result = train_medusa1(args.model, args.data, args.out, cache, args.max_positions, heads, config)
    print("\n".join(report(result)))
    return 0


def _check_data(data: Path) -> None:
    from engine.errors import ConfigError

    if not data.is_file():
        raise ConfigError("data", f"{data} is no file")
