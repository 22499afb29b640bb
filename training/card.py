"""The card of a head set, a README.md beside it: what it was made from, how, and what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from heads.checkpoint import load_heads
from training.calibrate import Calibration
from training.hidden_states import HiddenCache

CARD = "README.md"
HEADING = "## Measured\n"


def write_card(
    directory: Path, result: Calibration, data_name: str, cache: HiddenCache, settings: Mapping[str, object]
) -> None:
    """Write README.md into the head set's directory. The origin and licence of the data must be added by
    hand."""
    heads = load_heads(directory)
    lines = [
        f"# Heads for {heads.base_model}",
        "",
        f"{heads.kind}. The backbone is frozen; text does not change.",
        "",
        f"Trained on `{data_name}`: {cache.num_answer_tokens} answer tokens in {len(cache.documents)} "
        f"conversations, {int(cache.held_out.sum())} of them held out.",
        "",
        "Settings: " + ", ".join(f"{name} {value}" for name, value in settings.items()) + ".",
        "",
    ]
    (directory / CARD).write_text("\n".join(lines) + "\n" + _measured(result, data_name))


def update_card(directory: Path, result: Calibration, data_name: str) -> None:
    """Replace the figures, which belong to the old tree, with new ones. The rest stays."""
    path = directory / CARD
    text = path.read_text() if path.exists() else f"# Heads for {load_heads(directory).base_model}\n\n"
    before, heading, after = text.partition(HEADING)
    if not heading:
        before = before.rstrip("\n") + "\n\n"
    _, further, rest = after.partition("\n## ")
    path.write_text(before + _measured(result, data_name) + further + rest)


def _measured(result: Calibration, data_name: str) -> str:
    sizes = list(result.tokens_per_step)
    ranks = (1, 2, 3, 5, 10)
    lines = [
        HEADING,
        f"On {result.num_positions} held-out positions of `{data_name}`, greedy text where there is any.",
        "",
        "| nodes besides the root | " + " | ".join(map(str, sizes)) + " |",
        "|---" * (len(sizes) + 1) + "|",
        "| tokens per step | " + " | ".join(f"{result.tokens_per_step[n]:.2f}" for n in sizes) + " |",
        "",
        "| hit rate (%) | " + " | ".join(f"top-{n}" for n in ranks) + " |",
        "|---" * (len(ranks) + 1) + "|",
    ]
    for head, rates in enumerate(result.hit_rates):
        lines.append(f"| head {head} | " + " | ".join(f"{100 * sum(rates[:n]):.1f}" for n in ranks) + " |")
    return "\n".join(lines) + "\n"
