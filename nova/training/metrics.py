"""metrics.csv and metrics.png of a run."""

import csv
from pathlib import Path

from ..errors import InputError

CSV_NAME, PLOT_NAME = "metrics.csv", "metrics.png"


class MetricsFile:
    """A CSV file with one row a logged step; a resumed run leaves no step twice.

    Args:
        folder: of the run; made if it is absent.
        first_step: rows from this step on, of a run that went further than its last checkpoint,
            are removed. 0 starts a new file.
    """

    def __init__(self, folder: Path, first_step: int):
        self.path = folder / CSV_NAME
        folder.mkdir(parents=True, exist_ok=True)
        self._columns: list[str] = []
        rows = read_metrics(folder) if first_step and self.path.exists() else []
        self.path.unlink(missing_ok=True)
        for row in rows:
            if row["step"] <= first_step:
                self.write(row)

    def write(self, row: dict[str, float]) -> None:
        """Append a row; the first one names the columns. "step" is the number of steps done."""
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if not self._columns:
                self._columns = list(row)
                writer.writerow(self._columns)
            # repr gives floats back exactly, so that runs can be compared by their files.
            writer.writerow([repr(row[name]) for name in self._columns])


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The rows of a run's metrics.csv.

    Raises:
        InputError: there is none.
    """
    try:
        with (folder / CSV_NAME).open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise InputError(f"{folder} has no {CSV_NAME}: {error}") from None
    # A killed run may have left half a row.
    whole = [row for row in rows if None not in row.values() and "" not in row.values()]
    return [
        {name: int(value) if name == "step" else float(value) for name, value in row.items()}
        for row in whole
    ]


def plot_metrics(folder: Path) -> None:
    """Draw metrics.png from metrics.csv: a panel for every column but the step.

    Without matplotlib, or before the first row, there is no plot.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    rows = read_metrics(folder) if (folder / CSV_NAME).exists() else []
    if not rows:
        return
    steps = [row["step"] for row in rows]
    names = [name for name in rows[0] if name != "step"]
    figure = Figure(figsize=(8, 2.2 * len(names)), layout="constrained")
    for name, axes in zip(names, figure.subplots(len(names), sharex=True), strict=True):
        values = [row[name] for row in rows]
        axes.plot(steps, values, linewidth=0.6, alpha=0.5)
        axes.plot(steps, _smooth(values), linewidth=1.5)
        # Losses fall by factors.
        if "loss" in name and min(values) > 0:
            axes.set_yscale("log")
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
    axes.set_xlabel("step")
    figure.savefig(folder / PLOT_NAME, dpi=100)


def _smooth(values: list[float]) -> list[float]:
    """Running mean with a memory of about a twentieth of the run."""
    share = 1 / max(len(values) / 20, 1)
    smooth, mean = [], values[0]
    for value in values:
        mean += share * (value - mean)
        smooth.append(mean)
    return smooth
