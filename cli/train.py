"""`gorgon train heads|joint|overlap`: make head sets from a model's own text."""

from __future__ import annotations

import argparse
import math

from cli import overlap, train_heads, train_joint
from cli.parser import Subparsers
from heads.defaults import DEFAULT_MODEL


def register(subparsers: Subparsers[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("train", help="train head sets")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    train_heads.register(commands, DEFAULT_MODEL, _positive, _positive_float)
    train_joint.register(commands, DEFAULT_MODEL, _positive, _positive_float)

    overlap.register(commands)


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
