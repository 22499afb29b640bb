"""What a calibration found, as lines for people: tables of hit rates, of the tree's nodes and of tasks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from training.calibrate import SHOWN_RANKS, Calibration

SHOWN_NODES = 16


def report(result: Calibration) -> list[str]:
    """Hit rates by head and rank, the first nodes of the tree, tokens per step by tree size and by task."""
    lines = [f"measured on {result.num_positions} held-out positions", "", *_hit_rates(result)]
    lines += ["", *_nodes(result), "", *_sizes(result)]
    return [*lines, "", *_tasks(result)] if result.by_task else lines


def independent_tokens(result: Calibration) -> list[float]:
    """Tokens a step would commit with the first 0, 1, ... nodes of the family if heads were right
    independently of each other, [num_paths + 1]."""
    return list(accumulate(result.independent(), initial=1.0))


def _hit_rates(result: Calibration) -> list[str]:
    ranks = [str(rank) for rank in range(1, SHOWN_RANKS + 1)]
    rows = [
        [str(head), *(_percent(rate) for rate in rates[:SHOWN_RANKS]), _percent(sum(rates[:SHOWN_RANKS]))]
        for head, rates in enumerate(result.hit_rates)
    ]
    return [
        "Hit rates in %, by head and rank of its guess, each head shown the true tokens before its place, as",
        "when every guess before was right:",
        *_table(["head", *ranks, f"top {SHOWN_RANKS}"], rows),
    ]


def _nodes(result: Calibration) -> list[str]:
    family = result.family
    columns = (family.gains, result.independent(), result.conditional())
    rows = []
    for node, (path, *rates) in enumerate(zip(family.paths, *columns, strict=True), 1):
        own = result.hit_rates[len(path) - 1][path[-1]]
        name = " ".join(str(rank + 1) for rank in path)
        rows.append([name, str(node), *(_percent(rate) for rate in (*rates, own))])
    return [
        "The tree's first nodes, by the ranks of their path, in %. Accepted: the whole path is right, as",
        "counted on the text. Independent: the product of its hit rates, what that would be if heads were",
        "right independently. Given its parent: right where its parent is; were heads independent, it would",
        "equal the head's hit rate over all positions. Trees are made from what is accepted:",
        *_table(
            ["ranks", "node", "accepted", "independent", "given its parent", "hit rate"], rows[:SHOWN_NODES]
        ),
    ]


def _sizes(result: Calibration) -> list[str]:
    expected = list(accumulate(result.family.gains, initial=1.0))
    independent = independent_tokens(result)
    rows = [
        [str(size), f"{expected[size]:.2f}", f"{independent[size]:.2f}", f"{tokens:.2f}"]
        for size, tokens in result.tokens_per_step.items()
    ]
    return [
        "Tokens per step by draft nodes: expected at any position of the text, expected if heads were right",
        "independently, and measured walking through the answers step by step:",
        *_table(["nodes", "expected", "independent", "measured"], rows),
    ]


def _tasks(result: Calibration) -> list[str]:
    sizes = list(result.tokens_per_step)
    heads = range(len(result.hit_rates))
    rows = [
        [
            name,
            str(rates.num_positions),
            *(_percent(rates.hit_rates[head][0]) for head in heads),
            *(f"{rates.tokens_per_step[size]:.2f}" for size in sizes),
        ]
        for name, rates in result.by_task.items()
    ]
    return [
        "By task: how often each head's first guess is right, in %, and tokens per step by draft nodes n:",
        *_table(
            ["task", "positions", *(f"head {head}" for head in heads), *(f"n={size}" for size in sizes)],
            rows,
        ),
    ]


def _percent(rate: float) -> str:
    return f"{100 * rate:.1f}"


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as their widest cell; the first to the left, figures to the right."""
    cells = [headers, *rows]
    first, *widths = [max(len(row[column]) for row in cells) for column in range(len(headers))]
    return [
        "  ".join([row[0].ljust(first), *(cell.rjust(w) for cell, w in zip(row[1:], widths, strict=True))])
        for row in cells
    ]
