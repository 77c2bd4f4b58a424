"""Results as pictures: bars of accuracies, motion scores, quality against speed, contact sheets."""

import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from quality_results import SHARE, Quantity, Section, TaskResult
from quality_scoring import ENTRIES
from quality_speed import FPS
from quality_tables import TITLES, format_value

from nova.errors import DependencyError
from nova.media import compare_clips, write_image

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

ACCURACIES = "accuracies.png"
COLUMNS = 3
PANEL_SIZE = (4.6, 3.2)  # inches
DPI = 120
BAR_COLOR = "#7aa6d6"
MARKERS = "os^Dv*"
# Attribute of a quantity -> how its line is drawn.
LEVELS = {
    "ceiling": {"color": "#1e8449", "linewidth": 2},
    "floor": {"color": "#7f8c8d", "linewidth": 2},
    "wanted": {"color": "#c0392b", "linewidth": 1.5, "linestyle": "dashed"},
}


def require_matplotlib() -> None:
    """Raises DependencyError: there is no matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise DependencyError(
            "--plots needs matplotlib: pip install 'nova-kernels[train]'"
        ) from error


def plot_task(folder: Path, result: TaskResult) -> None:
    """What shows one task alone: a contact sheet, motion scores, or quality against speed."""
    if result.examples:
        sheet = compare_clips(
            [example.frames for example in result.examples],
            captions=[example.text for example in result.examples],
        )
        write_image(folder / f"clips_{result.task}.png", sheet)
    if any(section.pairs for section in result.sections):
        plot_motion(folder / "motion.png", result)
    if result.task == "sweep":
        plot_speed(folder / "speed.png", result)


def plot_accuracies(path: Path, results: Sequence[TaskResult]) -> None:
    """A panel for each section of shares, with ceilings, floors and what is wanted."""
    panels = [
        (f"{TITLES[result.task]}: {section.name}", shares)
        for result in results
        for section in result.sections
        if result.task != "sweep" and not section.is_part
        if (shares := [q for q in section.quantities if q.unit == SHARE])
    ]
    if not panels:
        return
    figure, all_axes = _panels(len(panels))
    for axes, (title, quantities) in zip(all_axes, panels, strict=True):
        axes.set_title(title, fontsize=10)
        _draw_bars(axes, quantities)
    handles, labels = all_axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    figure.savefig(path, dpi=DPI)


def plot_motion(path: Path, result: TaskResult) -> None:
    """Score asked for against score measured, a point a clip."""
    sections = [section for section in result.sections if section.pairs]
    figure, all_axes = _panels(len(sections))
    for axes, section in zip(all_axes, sections, strict=True):
        asked, measured = np.array(section.pairs).T
        (quantity,) = section.quantities
        value, low, high, ceiling = (
            format_value(getattr(quantity, name), "")
            for name in ("value", "low", "high", "ceiling")
        )
        axes.scatter(asked, measured, s=14, alpha=0.6, linewidths=0)
        largest = max(asked.max(), measured.max())
        axes.plot([0, largest], [0, largest], color="gray", linewidth=0.8, zorder=0)
        axes.set_title(
            f"{section.name}: rank correlation {value}\n({low} to {high}, ceiling {ceiling})",
            fontsize=10,
        )
        axes.set_xlabel("motion score asked for")
        axes.set_ylabel("measured")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=DPI)


def plot_speed(path: Path, result: TaskResult) -> None:
    """A panel an entry, in it a line for every A and a mark for every D."""
    families = defaultdict(dict)  # sections by the parts of their names: ["A=16"]["D=25"]
    for section in result.sections:
        line, mark = section.name.split()
        families[line][mark] = section
    names = [name for name in ENTRIES if name in result.sections[0].by_name]
    figure, all_axes = _panels(len(names))
    for axes, name in zip(all_axes, names, strict=True):
        for line, presets in families.items():
            _draw_family(axes, line, list(presets.values()), name)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel(FPS)
        axes.set_xlim(left=0)
        axes.set_ylim(0, 1.05)
        axes.yaxis.set_major_formatter(_percent)
        axes.grid(alpha=0.3)
    lines, _ = all_axes[0].get_legend_handles_labels()
    marks = [
        _gray_mark(marker, mark) for marker, mark in zip(cycle(MARKERS), presets, strict=False)
    ]
    figure.legend(handles=[*lines, *marks], loc="outside lower center", ncols=len(lines + marks))
    figure.savefig(path, dpi=DPI)


def _panels(count: int) -> tuple["Figure", list["Axes"]]:
    from matplotlib.figure import Figure

    columns = min(COLUMNS, count)
    rows = math.ceil(count / columns)
    size = (PANEL_SIZE[0] * columns, PANEL_SIZE[1] * rows + 0.4)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for unused in axes[count:]:
        unused.remove()
    return figure, axes[:count]


def _draw_bars(axes: "Axes", quantities: Sequence[Quantity]) -> None:
    positions = np.arange(len(quantities))
    values = np.array([q.value for q in quantities])
    axes.bar(positions, values, color=BAR_COLOR, label="generated")
    axes.errorbar(positions, values, _reach(quantities), fmt="none", color="black", capsize=3)
    for name, style in LEVELS.items():
        levels = [(x, getattr(q, name)) for x, q in enumerate(quantities)]
        levels = [(x, y) for x, y in levels if y is not None]
        x, y = np.array(levels, float).reshape(-1, 2).T
        axes.hlines(y, x - 0.45, x + 0.45, label=name, **style)
    axes.set_xticks(positions, [q.name for q in quantities], rotation=20, ha="right")
    axes.set_ylim(0, max(1.05, np.nanmax([1.0, *(q.high for q in quantities)]) + 0.05))
    axes.yaxis.set_major_formatter(_percent)
    axes.grid(alpha=0.3, axis="y")
    axes.set_axisbelow(True)


def _draw_family(axes: "Axes", label: str, sections: Sequence[Section], name: str) -> None:
    """One quantity of some sections, in a colour of their own."""
    quantities = [section.by_name[name] for section in sections]
    speeds = [section.by_name[FPS].value for section in sections]
    values = [q.value for q in quantities]
    line, *_ = axes.errorbar(speeds, values, _reach(quantities), capsize=2, label=label)
    for marker, *point in zip(cycle(MARKERS), speeds, values, strict=False):
        axes.plot(*point, marker=marker, color=line.get_color())


def _gray_mark(marker: str, label: str) -> "Line2D":
    """For a legend: what a mark means in every colour."""
    from matplotlib.lines import Line2D

    return Line2D([], [], color="gray", linestyle="", marker=marker, label=label)


def _reach(quantities: Sequence[Quantity]) -> np.ndarray:
    """(2, n) how far the intervals reach below and above the values."""
    return np.array([(q.value - q.low, q.high - q.value) for q in quantities]).clip(0).T


def _percent(value: float, _: int) -> str:
    return f"{100 * value:.0f} %"
