"""How results are shown: a table for people, and JSON as the last line for programs."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Lower quartile, median and upper quartile, rounded to three digits behind the point."""
    if len(values) == 1:
        q1 = median = q3 = values[0]
    else:
        q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"q1": round(q1, 3), "median": round(median, 3), "q3": round(q3, 3)}


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """Mean, p50, p90 and p99, interpolated between ranks, to four digits; None without values."""
    if not values:
        return None
    cuts = statistics.quantiles(values, n=100, method="inclusive") if len(values) > 1 else [values[0]] * 99
    figures = {"mean": statistics.fmean(values), "p50": cuts[49], "p90": cuts[89], "p99": cuts[98]}
    return {name: round(value, 4) for name, value in figures.items()}


def mean_and_std(values: Sequence[float]) -> dict[str, float]:
    """Mean, standard deviation and count."""
    return {
        "mean": round(statistics.fmean(values), 3) if values else 0.0,
        "std": round(statistics.pstdev(values), 3) if values else 0.0,
        "count": len(values),
    }


def print_table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Columns as wide as their widest cell; the first to the left, figures to the right."""
    cells = [[str(header) for header in headers], *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(headers))]
    for index, row in enumerate(cells):
        first, *rest = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        print("  ".join([first.strip().ljust(widths[0]), *rest]))
        if index == 0:
            print("  ".join("-" * width for width in widths))
    print()


def print_json(document: Mapping[str, object]) -> None:
    print(json.dumps(document), flush=True)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)
