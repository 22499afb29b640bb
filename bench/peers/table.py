"""The one table of `gorgon bench peers`: every server's figures, and how many times as fast ours is."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from bench.peers.servers import OURS
from bench.peers.turns import FIRST_TOKEN_PROMPT, FIRST_TOKEN_REQUESTS, Running
from bench.report import print_table, quartiles


def results_of(servers: Sequence[Running]) -> dict[str, dict[str, Any]]:
    """Everything measured, by server, and ratios to ours where it was measured too.

    A ratio is ours over theirs, round by round, over the rounds that both have.
    """
    ours = next((server for server in servers if server.name == OURS), None)
    return {server.name: _result(server, ours) for server in servers}


def _result(server: Running, ours: Running | None) -> dict[str, Any]:
    levels = {}
    for level, rounds in server.levels.items():
        rates = [figures["tokens_per_second"] for figures in rounds]
        levels[str(level)] = {
            "tokens_per_second": quartiles(rates),
            "times_as_fast_is_ours": None if ours is None else _ratio(ours.levels.get(level, []), rates),
            "tokens_per_step": _mean([figures["tokens_per_step"] for figures in rounds]),
            "cut_off": any(figures["timed_out"] for figures in rounds),
            "rounds": rounds,
        }
    first = [figures["ttft_seconds"]["p50"] for figures in server.first_token if figures["ttft_seconds"]]
    return {
        "levels": levels,
        "first_token_seconds": quartiles(first) if first else None,
        "first_token_cut_off": any(figures["timed_out"] for figures in server.first_token),
        "first_token_rounds": server.first_token,
        "resident_bytes": server.resident_bytes,
        "start_seconds": round(server.process.start_seconds, 2),
    }


def _ratio(ours: Sequence[Mapping[str, Any]], theirs: Sequence[float]) -> dict[str, float] | None:
    pairs = zip((figures["tokens_per_second"] for figures in ours), theirs, strict=False)
    ratios = [mine / other for mine, other in pairs if other]
    return quartiles(ratios) if ratios else None


def _mean(values: Sequence[float | None]) -> float | None:
    told = [value for value in values if value is not None]
    return round(statistics.fmean(told), 3) if told else None


def print_results(
    results: Mapping[str, Mapping[str, Any]], failures: Mapping[str, str], levels: Sequence[int]
) -> None:
    print(
        "tokens/s at so many requests at once, median of the rounds; behind it, how many times as fast ours "
        f"is.\nttft: median of {FIRST_TOKEN_REQUESTS} prompts of {FIRST_TOKEN_PROMPT} tokens sent at once. "
        "tok/step: at the fewest requests, where the server tells. start: to the first answered token. "
        "~: cut off by the time limit.\n"
    )
    print_table(
        ["server", *(str(level) for level in levels), "tok/step", "ttft ms", "memory MB", "start s"],
        [_row(name, result, levels) for name, result in results.items()],
    )
    for name, reason in failures.items():
        print(f"{name}: not measured to the end: {reason}")
    if failures:
        print()


def _row(name: str, result: Mapping[str, Any], levels: Sequence[int]) -> list[object]:
    first, memory = result["first_token_seconds"], result["resident_bytes"]
    smallest = result["levels"].get(str(min(levels)))
    return [
        name,
        *(_cell(result["levels"].get(str(level)), name == OURS) for level in levels),
        None if smallest is None else smallest["tokens_per_step"],
        None if first is None else f"{_mark(result['first_token_cut_off'])}{1000 * first['median']:.0f}",
        None if memory is None else f"{memory / 1e6:.0f}",
        result["start_seconds"],
    ]


def _cell(level: Mapping[str, Any] | None, is_ours: bool) -> str | None:
    if level is None:
        return None
    rate = f"{_mark(level['cut_off'])}{level['tokens_per_second']['median']:.1f}"
    ratio = level["times_as_fast_is_ours"]
    return rate if is_ours or ratio is None else f"{rate} {ratio['median']:.2f}x"


def _mark(cut_off: bool) -> str:
    return "~" if cut_off else ""
