"""The plots of the report, as PNG files. matplotlib is an extra and imported only here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from typing import Any

from evaluation.answers import EvaluateError
from evaluation.figures import ALL, MANY, shares
from evaluation.modes import OFF, nodes_of

GRID_COLUMNS = 3
_LINES = ("--", ":", "-.", (0, (1, 4)))  # colours are the tasks'
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
    of_tasks = {name: task for name, task in tasks.items() if name != ALL}
    plots = [
        (
            "speedup",
            "Speed-up over speculation off, median and quartiles over prompts",
            _one(_speedup, tasks),
        ),
        ("nodes", "Tokens per step by nodes of the tree", _one(_nodes, tasks)),
        ("depth", "Share of trees whose token at a depth was accepted", _one(_depth, tasks[ALL])),
        ("histogram", "Share of steps by how many tokens they committed", _one(_histogram, tasks[ALL])),
        (
            "depth-tasks",
            "Share of trees whose token at a depth was accepted, by task",
            _grid(_depth, of_tasks),
        ),
        (
            "histogram-tasks",
            "Share of steps by how many tokens they committed, by task",
            _grid(_histogram, of_tasks),
        ),
    ]
    drawn = []
    for name, caption, figure in plots:
        if figure is None:
            continue
        figure.suptitle(f"{caption} (temperature {figures['temperature']:g})", fontsize=11)
        path = folder / f"{name}-t{figures['temperature']:g}.png"
        figure.savefig(path, dpi=120)
        drawn.append((path, caption))
    return drawn


def _one(plot: Callable[[Any, Mapping[str, Any]], bool], values: Mapping[str, Any]) -> Any:
    """A figure of one plot; None where it has nothing to show."""
    figure, [[axes]] = _figure(1, 1, (9, 4.2))
    if not plot(axes, values):
        return None
    _legend(figure, axes)
    return figure


def _grid(plot: Callable[[Any, Mapping[str, Any]], bool], tasks: Mapping[str, Any]) -> Any:
    """A figure with a plot for each task on the same scales; None where there are no tasks."""
    if not tasks:
        return None
    columns = min(GRID_COLUMNS, len(tasks))
    rows = -(-len(tasks) // columns)
    figure, grid = _figure(rows, columns, (1.5 + 3 * columns, 0.6 + 2.4 * rows))
    places = [axes for row in grid for axes in row]
    for axes in places[len(tasks) :]:
        axes.remove()
    if not all([plot(axes, task) for axes, task in zip(places, tasks.values(), strict=False)]):
        return None
    for axes, name in zip(places, tasks, strict=False):
        axes.set_title(name, fontsize=10)
        axes.label_outer()
    _legend(figure, places[0])
    return figure


def _figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """A figure and its axes, [rows][columns]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for row in grid:
        for axes in row:
            axes.grid(axis="y", alpha=0.3)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
    return figure, grid


def _color(mode: str, modes: Sequence[str]) -> Any:
    """Trees in shades of blue by size, everything else in a colour of its own."""
    from matplotlib import colormaps

    trees = [name for name in modes if nodes_of(name) is not None]
    if mode in trees:
        return colormaps["Blues"](0.25 + 0.7 * (trees.index(mode) + 1) / len(trees))
    others = [name for name in modes if name not in trees]
    return _COLORS[others.index(mode) % len(_COLORS)]


def _legend(figure: Any, axes: Any) -> None:
    """A legend beside the plots, where it covers nothing."""
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False)


def _drafting(task: Mapping[str, Any]) -> dict[str, Any]:
    return {mode: figures for mode, figures in task["modes"].items() if mode != OFF}


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


def _speedup(axes: Any, tasks: Mapping[str, Any]) -> bool:
    modes = list(_drafting(tasks[ALL]))
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
    """A line for each task, and marks for the modes without a fixed tree, over all tasks."""
    drafting = _drafting(tasks[ALL])
    trees = {mode: nodes for mode in drafting if (nodes := nodes_of(mode)) is not None}
    if not trees:
        return False
    sizes = [0, *trees.values()]
    for name, task in tasks.items():
        means = [task["modes"][mode]["tokens_per_step"]["mean"] for mode in (OFF, *trees)]
        whole = {"color": "black", "linewidth": 2.5, "zorder": 3} if name == ALL else {"linewidth": 1}
        axes.plot(sizes, means, marker="o", markersize=4, label=name, **whole)
    others = [mode for mode in drafting if mode not in trees]
    for mode, style in zip(others, cycle(_LINES)):
        mean = drafting[mode]["tokens_per_step"]["mean"]
        axes.axhline(mean, linestyle=style, color="0.35", linewidth=1.2, label=f"{mode}, {ALL}")
    axes.set_xscale("symlog", base=2, linthresh=4)
    axes.set_xticks(sizes, [str(size) for size in sizes], minor=False)
    axes.set_xticks([], minor=True)
    axes.set_xlim(left=-0.2)
    axes.set_xlabel("draft nodes besides the root")
    axes.set_ylabel("tokens per step")
    return True


def _depth(axes: Any, task: Mapping[str, Any]) -> bool:
    drafting = _drafting(task)
    modes = {
        mode: figures["acceptance_by_depth"][:MANY]
        for mode, figures in drafting.items()
        if figures["acceptance_by_depth"]
    }
    for mode, accepted in modes.items():
        depths, percent = range(1, len(accepted) + 1), [100 * share for share in accepted]
        axes.plot(depths, percent, marker="o", markersize=4, label=mode, color=_color(mode, list(drafting)))
    if not modes:
        return False
    axes.set_xticks(range(1, max(map(len, modes.values())) + 1))
    axes.set_xlabel("depth in the tree")
    axes.set_ylabel("accepted, %")
    axes.set_ylim(bottom=0)
    return True


def _histogram(axes: Any, task: Mapping[str, Any]) -> bool:
    parts = {mode: shares(figures["histogram"]) for mode, figures in _drafting(task).items()}
    longest = max(parts.values(), key=len)
    labels = list(longest)
    heights = {mode: [100 * part.get(label, 0.0) for label in labels] for mode, part in parts.items()}
    _bars(axes, list(parts), heights)
    axes.set_xticks(range(len(labels)), labels)
    axes.set_xlabel("tokens committed in one step")
    axes.set_ylabel("steps, %")
    return True
