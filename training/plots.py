"""The plot of a calibrated tree: how many tokens a step is expected to commit, by the tree's size.

matplotlib comes with the extra `report` and is imported only when a plot is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path

from engine.errors import GorgonError
from trees.family import TreeFamily


class PlotError(GorgonError):
    """A plot that cannot be drawn here; the message says what to install."""


def can_plot() -> bool:
    return find_spec("matplotlib") is not None


def expected_tokens(family: TreeFamily) -> list[float]:
    """Tokens a step commits with the first 0, 1, ... nodes of the family, [num_paths + 1]."""
    return list(accumulate(family.gains, initial=1.0))


def plot_expected_tokens(
    family: TreeFamily,
    path: Path,
    measured: Mapping[int, float] | None = None,
    independent: Sequence[float] | None = None,
    title: str = "",
) -> None:
    """Write a PNG of expected tokens per step against nodes besides the root.

    measured: tokens per step by nodes where they were measured, as points; independent: what would be
    expected if heads were right independently of each other, [num_paths + 1]. Raises PlotError without
    matplotlib.
    """
    if not can_plot():
        raise PlotError("plots need matplotlib: pip install 'gorgon-serve[report]'")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    expected = expected_tokens(family)
    axes.plot(range(len(expected)), expected, label="expected, from whole paths counted on the text")
    if independent is not None:
        label = "if heads were right independently"
        axes.plot(range(len(independent)), independent, "--", color="0.5", label=label)
    if measured:
        axes.plot(
            list(measured),
            list(measured.values()),
            "o",
            color="tab:orange",
            label="measured, walking through answers",
        )
    axes.set_xlabel("draft nodes besides the root")
    axes.set_ylabel("tokens per step")
    axes.set_ylim(bottom=1.0)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False)
    axes.set_title(title)
    figure.savefig(path, dpi=120)
