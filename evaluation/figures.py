"""From answered prompts to the figures of the report: per temperature, per task and over all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bench.summary import compare, summarize
from engine.answering import Run
from evaluation.answers import Answered
from evaluation.modes import OFF

ALL = "all tasks"
MANY = 10  # tokens of a step, or levels of a tree, beyond which reports do not tell them apart


def figures_of(rows: Iterable[Answered], modes: Sequence[str]) -> list[dict[str, Any]]:
    """One entry per temperature: `temperature`, `tasks` (figures by task, ALL first), `exactness` by mode and
    `refused`, the prompts that the engine did not run."""
    by_temperature: dict[float, list[Answered]] = {}
    for row in rows:
        by_temperature.setdefault(row.temperature, []).append(row)
    return [_at(temperature, by_temperature[temperature], modes) for temperature in sorted(by_temperature)]


def _at(temperature: float, rows: list[Answered], modes: Sequence[str]) -> dict[str, Any]:
    answered = [row for row in rows if row.refused is None]
    by_task: dict[str, list[Answered]] = {ALL: answered} if answered else {}
    names = sorted({row.task for row in answered})
    if len(names) > 1:
        by_task |= {name: [row for row in answered if row.task == name] for name in names}
    return {
        "temperature": temperature,
        "tasks": {name: _of_task(of_task, modes) for name, of_task in by_task.items()},
        "exactness": {mode: exactness(answered, mode) for mode in modes if mode != OFF},
        "refused": [{"id": row.id, "reason": row.refused} for row in rows if row.refused is not None],
    }


def _of_task(rows: list[Answered], modes: Sequence[str]) -> dict[str, Any]:
    runs: dict[str, list[Run]] = {
        mode: [turn.runs[mode] for row in rows for turn in row.turns] for mode in modes
    }
    figures = {}
    for mode in modes:
        summary = summarize(runs[mode])
        summary["histogram"] = histogram(runs[mode])
        summary["speedup"] = None if mode == OFF else compare(runs, mode, OFF)
        figures[mode] = summary
    return {"prompts": len(rows), "turns": len(runs[OFF]), "modes": figures}


def histogram(runs: Sequence[Run]) -> dict[str, int]:
    """How many steps committed 1, 2, ... tokens, up to the most that any did."""
    counts = Counter(count for run in runs for count in run.committed)
    return {str(tokens): counts[tokens] for tokens in range(1, max(counts, default=0) + 1)}


def shares(histogram: Mapping[str, int]) -> dict[str, float]:
    """The share of steps that committed 1, 2, ... tokens. Large numbers share one entry, since n-grams can
    commit dozens."""
    total = sum(histogram.values())
    parts = {tokens: count / total for tokens, count in histogram.items() if int(tokens) < MANY}
    many = sum(count for tokens, count in histogram.items() if int(tokens) >= MANY)
    return parts | {f"{MANY}+": many / total} if many else parts


def exactness(rows: Sequence[Answered], mode: str) -> dict[str, Any]:
    """Answers of one mode against off's. `places` are the first differences, one per answer that has one."""
    places = [
        {
            "id": row.id,
            "turn": number,
            "position": difference.position,
            "expected": difference.expected,
            "found": difference.found,
            "gap": difference.gap,
            "near_tie": difference.near_tie,
        }
        for row in rows
        for number, turn in enumerate(row.turns, 1)
        if (difference := turn.differences.get(mode)) is not None
    ]
    answers = sum(len(row.turns) for row in rows)
    near_ties = sum(bool(place["near_tie"]) for place in places)
    return {
        "answers": answers,
        "identical": answers - len(places),
        "near_ties": near_ties,
        "wrong": len(places) - near_ties,
        "places": places,
    }
