"""The blocks of the report, from the document that results.json holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation.document import Block, Heading, Image, Paragraph, Table
from evaluation.figures import ALL, MANY, shares

MAX_PLACES = 20

_FACTS = {
    "model": "model",
    "heads": "head set",
    "prompt_file": "prompts from",
    "prompts": "prompts",
    "turns": "turns answered",
    "max_tokens": "tokens per answer, at most",
    "dtype": "number format",
    "quantization": "quantization of the weights",
    "device": "device",
    "cpu": "processor",
    "cores": "cores",
    "threads": "threads of torch",
    "load_average": "load average at the start",
    "torch": "torch",
    "python": "python",
    "gorgon": "gorgon",
    "date": "date",
    "command": "command",
}

_METHOD = (
    "Every prompt is answered by every mode in one process, one request at a time, in an order that rotates "
    "from prompt to prompt. Later turns of a conversation follow what off answered. Tokens per step count "
    "every pass that commits tokens, the prompt's own included, with the standard deviation over passes. "
    "Speed-up is the ratio of tokens per second to off's, from request to last token, prompt by prompt; of "
    "totals is the same over the summed tokens and times. Accepted by depth is the share of trees reaching a "
    "depth whose token there was accepted. Each mode is an engine with a prefix cache of its own; at a "
    "second temperature all of them find the prompt in it. Mode auto chooses the size of the head set's tree "
    "in every step, n-grams among its guesses; tree:N drafts N tokens in all of them by the heads alone, "
    "merged:N with n-grams as well. Mode ngram drafts what followed the last words earlier in the "
    "conversation, if they have occurred; mode draft decodes with a smaller model. Both draft chains of a "
    "fixed length and are verified as trees are."
)
_EXACTNESS = (
    "An answer that differs from off's parted at a near-tie where the model itself cannot tell the two "
    "tokens apart beyond rounding: their logits, at a temperature with the noise of the draw, lie closer "
    "than this number format resolves. Any other difference is wrong."
)


def report_blocks(document: Mapping[str, Any], plots: Sequence[Sequence[tuple[Path, str]]]) -> list[Block]:
    """plots: for each temperature of the document its files and captions."""
    blocks: list[Block] = [Heading(1, f"Evaluation of {document['heads']}")]
    facts = [(label, str(document[name])) for name, label in _FACTS.items() if document[name] is not None]
    facts += [(f"mode {name}", text) for name, text in document["baselines"].items()]
    blocks.append(Table(["fact", "value"], facts, facts=True))
    for figures, images in zip(document["figures"], plots, strict=True):
        blocks += _temperature(figures, images)
    return [*blocks, Heading(2, "How it was measured"), Paragraph(_METHOD)]


def main_table(figures: Mapping[str, Any], task: str = ALL) -> Table:
    """One line for each mode."""
    headers = ["mode", "tokens/step", "sd", "drafts/step", "tokens/s", "speed-up", "quartiles", "of totals"]
    rows = []
    for mode, values in figures["tasks"][task]["modes"].items():
        speedup, steps = values["speedup"], values["tokens_per_step"]
        end_to_end = speedup and speedup["end_to_end"]
        rows.append(
            [
                mode,
                f"{steps['mean']:.2f}",
                f"{steps['std']:.2f}",
                f"{values['drafts_per_step']:.1f}",
                f"{values['tokens_per_second']:.1f}",
                f"{end_to_end['median']:.2f}" if end_to_end else "1",
                f"{end_to_end['q1']:.2f}-{end_to_end['q3']:.2f}" if end_to_end else "",
                f"{speedup['of_totals']:.2f}" if speedup else "1",
            ]
        )
    return Table(headers, rows)


def _temperature(figures: Mapping[str, Any], images: Sequence[tuple[Path, str]]) -> Iterator[Block]:
    yield Heading(2, f"Temperature {figures['temperature']:g}")
    for refused in figures["refused"]:
        yield Paragraph(f"Not answered: {refused['id']}: {refused['reason']}")
    tasks = figures["tasks"]
    if not tasks:
        return
    yield main_table(figures)
    yield from (Image(path, caption) for path, caption in images)
    modes = [mode for mode, values in tasks[ALL]["modes"].items() if values["speedup"]]
    if len(tasks) > 1:
        yield Heading(3, "Tokens per step by task, mean ± standard deviation")
        yield _by_task(tasks, modes, _steps)
        yield Heading(3, "Speed-up by task, median (quartiles) over prompts")
        yield _by_task(tasks, modes, _speedup)
        yield Heading(3, "Speed-up by task, of totals")
        yield _by_task(tasks, modes, lambda values: f"{values['speedup']['of_totals']:.2f}")
    yield Heading(3, "Accepted by depth and steps by tokens committed, %")
    yield from _distributions(tasks[ALL], modes)
    yield Heading(3, "Exactness")
    yield Paragraph(_EXACTNESS)
    yield from _exactness(figures["exactness"])
    if len(tasks) > 1:
        for name in tasks:
            if name != ALL:
                yield Heading(3, f"Task {name}")
                yield main_table(figures, name)
                yield from _distributions(tasks[name], modes)


def _distributions(task: Mapping[str, Any], modes: Sequence[str]) -> Iterator[Block]:
    """Acceptance by depth and the histogram of tokens per step, of one task or all."""
    depths = range(1, MANY + 1)
    accepted = {mode: task["modes"][mode]["acceptance_by_depth"] for mode in modes}
    yield _shares("depth", {m: dict(zip(map(str, depths), a, strict=False)) for m, a in accepted.items()})
    yield _shares("tokens", {mode: shares(task["modes"][mode]["histogram"]) for mode in modes})


def _by_task(
    tasks: Mapping[str, Any], modes: Sequence[str], cell: Callable[[Mapping[str, Any]], str]
) -> Table:
    rows = [
        [name, str(task["prompts"]), *(cell(task["modes"][mode]) for mode in modes)]
        for name, task in tasks.items()
    ]
    return Table(["task", "prompts", *modes], rows)


def _steps(values: Mapping[str, Any]) -> str:
    steps = values["tokens_per_step"]
    return f"{steps['mean']:.2f} ± {steps['std']:.2f}"


def _speedup(values: Mapping[str, Any]) -> str:
    ratio = values["speedup"]["end_to_end"]
    return f"{ratio['median']:.2f} ({ratio['q1']:.2f}-{ratio['q3']:.2f})"


def _shares(label: str, parts: Mapping[str, Mapping[str, float]]) -> Table:
    """A line for each mode; the columns are those of the longest."""
    longest = max(parts.values(), key=len) if parts else {}
    columns = list(longest)
    rows = [
        [mode, *(f"{100 * values[name]:.1f}" if name in values else "" for name in columns)]
        for mode, values in parts.items()
    ]
    return Table([f"mode, {label}", *columns], rows)


def _exactness(exactness: Mapping[str, Any]) -> Iterator[Block]:
    yield Table(
        ["mode", "answers", "identical", "parted at a near-tie", "wrong"],
        [
            [mode, *(str(found[name]) for name in ("answers", "identical", "near_ties", "wrong"))]
            for mode, found in exactness.items()
        ],
    )
    places = [(mode, place) for mode, found in exactness.items() for place in found["places"]]
    if not places:
        return
    places.sort(key=lambda item: item[1]["near_tie"])  # what is wrong comes first
    yield Table(
        ["mode", "prompt", "turn", "at token", "off says", "mode says", "gap", "near-tie"],
        [
            [
                mode,
                *(str(place[name]) for name in ("id", "turn", "position", "expected", "found")),
                "" if place["gap"] is None else f"{place['gap']:.4g}",
                "yes" if place["near_tie"] else "no",
            ]
            for mode, place in places[:MAX_PLACES]
        ],
    )
    if len(places) > MAX_PLACES:
        yield Paragraph(f"And {len(places) - MAX_PLACES} more, all in results.json.")
