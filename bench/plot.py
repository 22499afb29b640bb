"""The plot of `gorgon bench serve`. matplotlib is an extra and imported only here."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from engine.errors import ConfigError

_TYPES = (".png", ".svg", ".pdf")
_STYLES = (("p50", "-"), ("p90", "--"), ("p99", ":"))


def check_plot(path: Path) -> None:
    """Raises ConfigError where this plot cannot be drawn, before anything is measured for it."""
    if find_spec("matplotlib") is None:
        raise ConfigError("plot", "needs matplotlib: pip install 'gorgon-serve[report]'")
    if path.suffix not in _TYPES:
        raise ConfigError("plot", f"{path.name} must end in one of {' '.join(_TYPES)}")
    if not path.parent.is_dir():
        raise ConfigError("plot", f"there is no folder {path.parent}")


def plot_levels(levels: Sequence[dict[str, Any]], path: Path) -> None:
    """Throughput, time to first token and time per token by level, of the type its suffix says."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    unit = "rate" if "rate" in levels[0] else "concurrency"
    places = [level[unit] for level in levels]
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    throughput, first, per_token = figure.subplots(1, 3)
    throughput.plot(places, [level["tokens_per_second"] for level in levels], marker="o")
    throughput.set_title("tokens per second", fontsize=11)
    for axes, key, title in (
        (first, "ttft_seconds", "time to first token, ms"),
        (per_token, "seconds_per_token", "time per token, ms"),
    ):
        told = [(place, level[key]) for place, level in zip(places, levels, strict=True) if level[key]]
        for name, style in _STYLES:
            values = [1000 * figures[name] for _, figures in told]
            axes.plot([place for place, _ in told], values, style, marker="o", color="tab:blue", label=name)
        axes.set_title(title, fontsize=11)
        axes.legend(fontsize=8, frameon=False)
    for axes in (throughput, first, per_token):
        axes.set_xlabel("requests per second" if unit == "rate" else "concurrent requests")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
