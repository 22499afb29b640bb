"""From the runs of several modes over the same prompts to the figures that are reported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.report import mean_and_std, print_table, quartiles
from engine.answering import Run

Runs = Mapping[str, Sequence[Run]]  # by mode, in the order of the prompts


def summarize(runs: Sequence[Run]) -> dict[str, Any]:
    """The figures of one mode. Tokens per step counts every committing step, the prompt's own included."""
    seconds = sum(run.seconds for run in runs)
    decode = [rate for run in runs if (rate := run.decode_tokens_per_second) is not None]
    steps = sum(run.steps for run in runs)
    return {
        "tokens": sum(run.num_tokens for run in runs),
        "tokens_per_second": round(sum(run.num_tokens for run in runs) / seconds, 2),
        "decode_tokens_per_second": quartiles(decode) if decode else None,
        "tokens_per_step": mean_and_std([n for run in runs for n in run.committed]),
        "drafts_per_step": round(sum(run.drafted for run in runs) / steps, 2),
        "acceptance_by_depth": acceptance_by_depth(runs),
    }


def acceptance_by_depth(runs: Sequence[Run]) -> list[float]:
    """For each depth from 1: the share of trees that reached it and had their token there accepted."""
    depth = max((len(run.drafted_by_depth) for run in runs), default=0)
    shares = []
    for d in range(depth):
        drafted = sum(run.drafted_by_depth[d] for run in runs if d < len(run.drafted_by_depth))
        accepted = sum(run.accepted_by_depth[d] for run in runs if d < len(run.accepted_by_depth))
        shares.append(round(accepted / drafted, 4) if drafted else 0.0)
    return shares


def compare(runs: Runs, mode: str, against: str) -> dict[str, Any]:
    """How much faster `mode` is: quartiles over prompts of the ratio of tokens per second, and of all time.

    `identical` counts prompts whose answers are the same token by token. Passes of different shapes round
    differently, so in bfloat16 a few may part at a near-tie.
    """
    pairs = list(zip(runs[mode], runs[against], strict=True))
    total = [a.tokens_per_second / b.tokens_per_second for a, b in pairs]
    decode = [
        fast / slow
        for a, b in pairs
        if (fast := a.decode_tokens_per_second) and (slow := b.decode_tokens_per_second)
    ]
    return {
        "end_to_end": quartiles(total),
        "decode": quartiles(decode) if decode else None,
        "of_totals": round(
            sum(a.num_tokens for a, _ in pairs)
            / sum(a.seconds for a, _ in pairs)
            / (sum(b.num_tokens for _, b in pairs) / sum(b.seconds for _, b in pairs)),
            3,
        ),
        "identical": sum(a.outputs == b.outputs for a, b in pairs),
        "prompts": len(pairs),
    }


def print_modes(modes: Mapping[str, dict[str, Any]]) -> None:
    print_table(
        ["mode", "tok/s", "decode tok/s", "tok/step", "std", "drafts/step", "accepted by depth"],
        [
            [
                name,
                figures["tokens_per_second"],
                figures["decode_tokens_per_second"] and figures["decode_tokens_per_second"]["median"],
                figures["tokens_per_step"]["mean"],
                figures["tokens_per_step"]["std"],
                figures["drafts_per_step"],
                " ".join(f"{share:.0%}" for share in figures["acceptance_by_depth"]),
            ]
            for name, figures in modes.items()
        ],
    )


def print_ratios(ratios: Mapping[str, dict[str, Any]]) -> None:
    rows: list[list[object]] = []
    for name, ratio in ratios.items():
        for part in ("end_to_end", "decode"):
            if ratio[part] is not None:
                rows.append([f"{name} {part.replace('_', ' ')}", *ratio[part].values(), ratio["of_totals"]])
    print_table(["ratio over prompts", "q1", "median", "q3", "of totals"], rows)
