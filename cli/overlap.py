"""`gorgon train overlap`: proves that no evaluation prompt is in training text."""

from __future__ import annotations

import argparse
import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cli.parser import Subparsers

if TYPE_CHECKING:
    from training.overlap import OverlapReport, Row

SHOWN_CHARACTERS = 120
SHOWN = 3  # evaluation rows named for one training row


def register(commands: Subparsers[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "overlap",
        help="prove that no evaluation prompt is in training text",
        description="Looks for evaluation prompts in training text, whole turns and 13 words in a row. Exits "
        "with 0 where there are none, with 1 where there are, naming the rows.",
    )
    parser.add_argument(
        "--data",
        type=Path,
        nargs="+",
        required=True,
        metavar="FILE",
        help="prompts or conversations trained on",
    )
    parser.add_argument(
        "--evaluation", type=Path, nargs="+", required=True, metavar="FILE", help="prompts evaluated on"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from engine.errors import ConfigError
    from training.overlap import find_overlaps

    for name in ("data", "evaluation"):
        for path in getattr(args, name):
            if not path.is_file():
                raise ConfigError(name, f"{path} is no file")
    report = find_overlaps(args.data, args.evaluation)
    print("\n".join(lines_of(report)))
    return 1 if report.overlaps else 0


def lines_of(report: OverlapReport) -> list[str]:
    """Every training row that overlaps, then counts by file."""
    from training.overlap import NUM_WORDS

    lines = []
    for overlap in report.overlaps:
        kinds = (("a turn of", overlap.exact), (f"{NUM_WORDS} words of", overlap.partial))
        shared = " and ".join(f"{kind} {_named(rows)}" for kind, rows in kinds if rows)
        words = textwrap.shorten(overlap.words, SHOWN_CHARACTERS)
        lines.append(
            f"{overlap.row.file} {overlap.row.id} ({', '.join(overlap.roles)}) has {shared}: {words}"
        )
    in_data = Counter(overlap.row.file for overlap in report.overlaps)
    for file, number in report.num_rows.items():
        lines.append(f"{file}: {in_data[file]} of {number} rows overlap with evaluation")
    in_evaluation = Counter(
        row.file for row in {row for o in report.overlaps for row in (*o.exact, *o.partial)}
    )
    for file, number in report.num_evaluation.items():
        lines.append(f"{file}: {in_evaluation[file]} of {number} prompts are in training")
    return lines


def _named(rows: Sequence[Row]) -> str:
    more = f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
    return ", ".join(f"{row.file} {row.id}" for row in rows[:SHOWN]) + more
