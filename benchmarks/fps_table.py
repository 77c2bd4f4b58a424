"""Results of fps.py as tables on the terminal."""

import sys
from collections.abc import Sequence
from typing import Any

from fps_gate import PLAIN_TORCH_SETS
from fps_rows import FLOAT32_ERROR, Row, float32_errors, has_float32_error, workload_name
from fps_workloads import RELEASED_VIDEO
from rich.console import Console
from rich.table import Table

PUBLISHED = (
    "Published by the model's authors (arXiv 2412.14169): 2.75 FPS, A100-40G, batch 24. Other "
    "hardware; not measured here."
)


def print_tables(rows: Sequence[Row], facts: dict[str, Any]) -> None:
    """Samplers, captions, and stages where they were measured."""
    console = Console(width=None if sys.stdout.isatty() else 180)
    console.print(_sampler_table(rows, facts))
    for caption in captions(rows, facts):
        console.print(caption, highlight=False)
    staged = [row for row in rows if "stages_s" in row]
    if staged:
        console.print(_stage_table(staged))


def captions(rows: Sequence[Row], facts: dict[str, Any]) -> list[str]:
    """What a reader of the table has to know."""
    lines = [
        "frames/s: sampling alone, prompts are embeddings already; with VAE: decoding included. "
        "Medians; a first run of each sampler is not timed, but where a run takes long.",
        "of floor: the floor is the exact sampler's operations at "
        f"{facts['matmul_TFLOP_per_s']:.3g} TFLOP/s, the fastest matrix product of this run.",
    ]
    tolerances = sorted({row["tolerance"] for row in rows})
    allowed = ", ".join(f"{tolerance:.0e}" for tolerance in tolerances)
    lines.append(f"Latents of all samplers agree with plain's, relative error up to {allowed}.")
    if any(has_float32_error(row) for row in rows):
        lines.append(
            f"from float32: error of what the first {PLAIN_TORCH_SETS} sets reveal, against plain "
            "torch in float32 with the same weights, prompts and noise. This package's samplers: "
            f"{float32_errors(rows) or 'nothing to compare with'}."
        )
    if any(row["weights"] == "checkpoint" for row in rows):
        lines.append("With a checkpoint's weights, on random prompts, the first sets are compared.")
    if any(row["geometry"] == RELEASED_VIDEO for row in rows):
        lines.append(PUBLISHED)
    return lines


def _sampler_table(rows: Sequence[Row], facts: dict[str, Any]) -> Table:
    versions = f"{facts['threads']} threads, torch {facts['torch']}"
    table = Table(title=f"Sampling on {facts['name']} ({versions})")
    for name in ("geometry", "sets", "batch", "sampler"):
        table.add_column(name)
    names = ("seconds", "spread", "1st frame", "1st run", "frames/s", "with VAE")
    has_error = any(has_float32_error(row) for row in rows)
    names += ("x plain", "of floor", "error", *(["from float32"] if has_error else []), "peak MB")
    for name in names:
        table.add_column(name, justify="right")
    for row in rows:
        names = (
            workload_name(row),
            f"{row['sets_run']} of {row['sets_of_video']}",
            str(row["batch"]),
            row["sampler"],
        )
        if "refused" in row:
            table.add_row(*names, row["refused"], style="dim")
        else:
            table.add_row(*names, *_figures(row, has_error))
    return table


def _figures(row: Row, has_error: bool) -> list[str]:
    times = row["latencies_s"]
    return [
        f"{row['latency_s']:.2f}",
        f"{min(times):.2f}-{max(times):.2f}",
        _or_dash(row["first_frame_s"], "{:.2f}"),
        f"{row['first_run_s']:.2f}",
        f"{row['fps']:.3g}",
        _or_dash(row["fps_with_vae"], "{:.3g}"),
        f"{row['ratio_to_plain']:.2f}",
        f"{100 * row['share_of_floor']:.1f} %",
        f"{row['max_error_vs_plain']:.1e}",
        *([_or_dash(row.get(FLOAT32_ERROR), "{:.1e}")] if has_error else []),
        f"{row['peak_memory_bytes'] / 2**20:.0f}",
    ]


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _stage_table(rows: Sequence[Row]) -> Table:
    title = "Stages of the exact sampler in seconds, measured in a run of its own"
    table = Table(title=title)
    table.add_column("geometry")
    table.add_column("batch")
    stages = list(dict.fromkeys(name for row in rows for name in row["stages_s"]))
    for name in (*stages, "together", "without clock"):
        table.add_column(name, justify="right")
    for row in rows:
        seconds = row["stages_s"]
        whole = sum(seconds.values())
        cells = [
            f"{seconds[name]:.3g} ({seconds[name] / whole:.0%})" if name in seconds else "-"
            for name in stages
        ]
        share = row["sets_run"] / row["sets_of_video"]
        unclocked = row["latency_s"] + share * ((row["text_s"] or 0.0) + (row["vae_s"] or 0.0))
        cells += [f"{whole:.3g}", f"{unclocked:.3g}"]
        table.add_row(workload_name(row), str(row["batch"]), *cells)
    return table
