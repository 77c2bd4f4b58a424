"""Results as tables on the terminal."""

import math
import sys

from quality_results import SHARE, Quantity, TaskResult
from rich.console import Console
from rich.table import Table

TITLES = {
    "text-to-video": "Text to video",
    "motion": "Motion score asked for and measured",
    "image-to-video": "Image to video",
    "continuation": "Continuing a clip",
    "extrapolation": "Twice the trained length",
    "frechet": "Fréchet distance",
    "sweep": "Quality against speed",
}
COLUMNS = ("clips", "measured", "95 % interval", "ceiling", "floor", "wanted", "reached")


def print_result(result: TaskResult) -> None:
    table = _sweep_table(result) if result.task == "sweep" else _quantity_table(result)
    Console(width=None if sys.stdout.isatty() else 150).print(table)


def format_value(value: float | None, unit: str) -> str:
    """A share as percent, other numbers with two decimals; "" for None, "-" for undefined ones."""
    if value is None:
        return ""
    if not math.isfinite(value):
        return "-"
    if unit == SHARE:
        return f"{100 * value:.1f} %"
    return f"{value:.2f} {unit}".rstrip()


def _quantity_table(result: TaskResult) -> Table:
    """One quantity a row."""
    table = Table(title=TITLES[result.task])
    table.add_column("")
    table.add_column("")
    for name in COLUMNS:
        table.add_column(name, justify="right")
    for section in result.sections:
        for number, quantity in enumerate(section.quantities):
            table.add_row(section.name if number == 0 else "", *_cells(quantity))
        table.add_section()
    return table


def _cells(quantity: Quantity) -> list[str]:
    low, high, value, ceiling, floor, wanted = (
        format_value(getattr(quantity, name), quantity.unit)
        for name in ("low", "high", "value", "ceiling", "floor", "wanted")
    )
    reached = {None: "", True: "yes", False: "no"}[quantity.reached]
    interval = f"{low} to {high}"
    return [quantity.name, str(quantity.count), value, interval, ceiling, floor, wanted, reached]


def _sweep_table(result: TaskResult) -> Table:
    """One preset a row, one quantity a column."""
    table = Table(title=TITLES[result.task])
    table.add_column("")
    for quantity in result.sections[0].quantities:
        table.add_column(quantity.name, justify="right")
    for section in result.sections:
        values = [format_value(q.value, q.unit) for q in section.quantities]
        table.add_row(section.name, *values)
    return table
