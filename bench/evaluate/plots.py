"""The plots of the report, as PNG files. matplotlib is an extra and imported only here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.evaluate.answers import EvaluateError
from bench.evaluate.figures import ALL
from bench.evaluate.modes import OFF, nodes_of

_COLORS = ("tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown")


def check_matplotlib() -> None:
    """Raises EvaluateError where plots cannot be drawn, before anything is measured for them."""
    if find_spec("matplotlib") is None:
        raise EvaluateError("the report has plots, which need matplotlib: pip install 'gorgon-serve[report]'")


def draw(figures: Mapping[str, Any], folder: Path) -> list[tuple[Path, str]]:
    """All plots of one temperature; each file with its caption. Nothing where no prompt was answered."""
    tasks = figures["tasks"]
    if not tasks:
        return []
    plots = [
        ("speedup", "Speed-up over speculation off, median and quartiles over prompts", _speedup),
        ("nodes", "Tokens per step by nodes of the tree", _nodes),
        ("depth", "Share of trees whose token at a depth was accepted", _depth),
        ("histogram", "Share of steps by how many tokens they committed", _histogram),
    ]
    drawn = []
    for name, caption, plot in plots:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        if not plot(axes, tasks):
            continue
        axes.set_title(f"{caption} (temperature {figures['temperature']:g})", fontsize=11)
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        path = folder / f"{name}-t{figures['temperature']:g}.png"
        figure.savefig(path, dpi=120)
        drawn.append((path, caption))
    return drawn


def _color(mode: str, modes: Sequence[str]) -> Any:
    """Trees in shades of blue by size, everything else in a colour of its own."""
    from matplotlib import colormaps

    trees = [name for name in modes if nodes_of(name) is not None]
    if mode in trees:
        return colormaps["Blues"](0.35 + 0.6 * trees.index(mode) / max(1, len(trees) - 1))
    others = [name for name in modes if name not in trees]
    return _COLORS[others.index(mode) % len(_COLORS)]


def _legend(axes: Any) -> None:
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)


def _drafting(tasks: Mapping[str, Any]) -> dict[str, Any]:
    return {mode: figures for mode, figures in tasks[ALL]["modes"].items() if mode != OFF}


def _bars(
    axes: Any, modes: Sequence[str], heights: Mapping[str, Sequence[float]], errors: Any = None
) -> None:
    """Groups of bars, one for each mode. heights[mode]: by group; errors[mode]: down and up, by group."""
    width = 0.8 / len(modes)
    for index, mode in enumerate(modes):
        places = [group + (index - (len(modes) - 1) / 2) * width for group in range(len(heights[mode]))]
        axes.bar(
            places,
            heights[mode],
            width,
            label=mode,
            color=_color(mode, modes),
            yerr=errors[mode] if errors else None,
            error_kw={"elinewidth": 0.8, "ecolor": "0.3"},
        )
    _legend(axes)


def _speedup(axes: Any, tasks: Mapping[str, Any]) -> bool:
    modes = list(_drafting(tasks))
    heights, errors = {}, {}
    for mode in modes:
        ratios = [task["modes"][mode]["speedup"]["end_to_end"] for task in tasks.values()]
        heights[mode] = [ratio["median"] for ratio in ratios]
        errors[mode] = [[r["median"] - r["q1"] for r in ratios], [r["q3"] - r["median"] for r in ratios]]
    _bars(axes, modes, heights, errors)
    axes.axhline(1.0, color="0.3", linewidth=0.8)
    axes.set_xticks(range(len(tasks)), list(tasks), rotation=20 if len(tasks) > 5 else 0)
    axes.set_ylabel("times as fast as off")
    return True


def _nodes(axes: Any, tasks: Mapping[str, Any]) -> bool:
    trees = {mode: nodes for mode in _drafting(tasks) if (nodes := nodes_of(mode)) is not None}
    if not trees:
        return False
    sizes = [0, *trees.values()]
    for name, task in tasks.items():
        means = [task["modes"][mode]["tokens_per_step"]["mean"] for mode in (OFF, *trees)]
        whole = name == ALL
        axes.plot(
            sizes, means, marker="o", label=name, linewidth=2.5 if whole else 1, zorder=3 if whole else 2
        )
    axes.set_xscale("symlog", base=2, linthresh=4)
    axes.set_xticks(sizes, [str(size) for size in sizes], minor=False)
    axes.set_xticks([], minor=True)
    axes.set_xlabel("draft nodes besides the root")
    axes.set_ylabel("tokens per step")
    _legend(axes)
    return True


def _depth(axes: Any, tasks: Mapping[str, Any]) -> bool:
    modes = {
        mode: f["acceptance_by_depth"] for mode, f in _drafting(tasks).items() if f["acceptance_by_depth"]
    }
    for mode, shares in modes.items():
        depths = range(1, len(shares) + 1)
        axes.plot(depths, [100 * s for s in shares], marker="o", label=mode, color=_color(mode, list(modes)))
    if not modes:
        return False
    axes.set_xticks(range(1, max(map(len, modes.values())) + 1))
    axes.set_xlabel("depth in the tree")
    axes.set_ylabel("accepted, %")
    axes.set_ylim(bottom=0)
    _legend(axes)
    return True


def _histogram(axes: Any, tasks: Mapping[str, Any]) -> bool:
    histograms = {mode: figures["histogram"] for mode, figures in _drafting(tasks).items()}
    most = max(len(counts) for counts in histograms.values())
    heights = {
        mode: [100 * counts.get(str(n), 0) / sum(counts.values()) for n in range(1, most + 1)]
        for mode, counts in histograms.items()
    }
    _bars(axes, list(histograms), heights)
    axes.set_xticks(range(most), [str(n) for n in range(1, most + 1)])
    axes.set_xlabel("tokens committed in one step")
    axes.set_ylabel("steps, %")
    return True
