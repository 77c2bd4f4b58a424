"""The table of the ops' times."""

from typing import Any

from rich.console import Console
from rich.table import Table

CAPTION = (
    "us: a call in a CUDA graph (timed: graph), where small tensors stay in the L2 cache as in the "
    "sampler. eager us: called from Python, caches flushed; where the GPU waits for the host, that "
    "counts. Rates and shares are those of us."
)


def print_times(rows: list[dict[str, Any]], facts: dict[str, Any]) -> None:
    """Print them.

    Args:
        rows: what `kernels.measure` gives.
        facts: what `measure.machine` gives.
    """
    table = Table(title=f"Ops on {facts['name']} (torch {facts['torch']})", caption=CAPTION)
    for column in ("op", "shape", "direction", "implementation"):
        table.add_column(column)
    for column in ("us", "timed", "eager us", "GB/s", "TFLOP/s", "of ceiling"):
        table.add_column(column, justify="right")
    table.add_column("why not")
    for row in rows:
        names = row["op"], row["shape"], row.get("direction", ""), row["implementation"]
        if "refused" in row:
            table.add_row(*names, *[""] * 6, row["refused"], style="dim")
            continue
        table.add_row(
            *names,
            f"{row['microseconds']:.1f}",
            row["timed"],
            f"{row['eager_us']:.1f}",
            f"{row['GB_per_s']:.0f}",
            f"{row['TFLOP_per_s']:.1f}",
            f"{row['share_of_ceiling']:.0%}",
            f"no graph: {row['no_graph']}" if "no_graph" in row else "",
        )
    Console(width=170).print(table)
