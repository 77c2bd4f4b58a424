"""Results of fps.py as a picture: frames a second of all samplers, and the exact one's stages."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fps_rows import Row, is_whole, workload_name

from nova.errors import DependencyError, InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANEL_SIZE = (5.4, 3.6)  # inches
DPI = 120


def check_plot(path: Path) -> None:
    """Check before long work that `plot` knows the format of a file.

    Raises:
        DependencyError: there is no matplotlib.
        InputError: the name ends in something else.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise DependencyError(
            "--plot needs matplotlib: pip install 'nova-kernels[train]'"
        ) from error
    formats = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.lower().removeprefix(".") not in formats:
        endings = ", ".join(f".{name}" for name in formats)
        raise InputError(f"--plot {path}: the name must end in one of {endings}")


def plot(path: Path, rows: Sequence[Row], title: str) -> None:
    """Write a picture: a column of panels for each workload, its frames a second and its stages.

    Args:
        path: its ending chooses the format, such as .png or .svg.
        rows: of fps.py; refused ones are left out.
    """
    from matplotlib.figure import Figure

    by_workload: dict[str, list[Row]] = {}
    for row in rows:
        if "refused" not in row:
            by_workload.setdefault(workload_name(row), []).append(row)
    columns = max(len(by_workload), 1)
    panels = 2 if any("stages_s" in row for row in rows) else 1
    size = PANEL_SIZE[0] * columns, PANEL_SIZE[1] * panels
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title)
    all_axes = figure.subplots(panels, columns, squeeze=False)
    for column, (name, of_workload) in enumerate(by_workload.items()):
        part = "" if is_whole(of_workload[0]) else "\n(a part of a video, scaled up)"
        all_axes[0, column].set_title(name + part, fontsize=10)
        _draw_speeds(all_axes[0, column], of_workload)
        with_stages = [row for row in of_workload if "stages_s" in row]
        if with_stages:
            _draw_stages(all_axes[1, column], with_stages)
    for axes in all_axes.flat:
        axes.set_visible(axes.has_data())
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)


def _draw_speeds(axes: "Axes", rows: Sequence[Row]) -> None:
    """Bars by batch size, a colour a sampler; lines reach from the slowest to the fastest run."""
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    samplers = list(dict.fromkeys(row["sampler"] for row in rows))
    width = 0.8 / len(samplers)
    for index, sampler in enumerate(samplers):
        own = [row for row in rows if row["sampler"] == sampler]
        x = [batches.index(row["batch"]) + (index - (len(samplers) - 1) / 2) * width for row in own]
        fps = [row["fps"] for row in own]
        # Frames a second of the slowest and the fastest run, as distances from the median's.
        slowest = [row["fps"] * row["latency_s"] / max(row["latencies_s"]) for row in own]
        fastest = [row["fps"] * row["latency_s"] / min(row["latencies_s"]) for row in own]
        reach = (
            [max(a - b, 0) for a, b in zip(fps, slowest, strict=True)],
            [max(b - a, 0) for a, b in zip(fps, fastest, strict=True)],
        )
        axes.bar(x, fps, width, yerr=reach, capsize=2, label=sampler)
    axes.set_xticks(range(len(batches)), [f"batch {batch}" for batch in batches])
    axes.set_ylabel("frames a second")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3, axis="y")
    axes.set_axisbelow(True)


def _draw_stages(axes: "Axes", rows: Sequence[Row]) -> None:
    """One bar a batch size, of stages one after the other, as shares of the whole."""
    names = list(dict.fromkeys(name for row in rows for name in row["stages_s"]))
    labels = [f"batch {row['batch']}" for row in rows]
    left = [0.0] * len(rows)
    for name in names:
        shares = [row["stages_s"].get(name, 0.0) / sum(row["stages_s"].values()) for row in rows]
        axes.barh(labels, shares, left=left, label=name)
        left = [a + b for a, b in zip(left, shares, strict=True)]
    axes.set_xlabel("share of the exact sampler's time")
    axes.set_xlim(0, 1)
    axes.legend(fontsize=8, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
