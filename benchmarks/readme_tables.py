"""The README's tables, made from the JSON files of benchmarks/results.

    python benchmarks/readme_tables.py            # rewrite README.md
    python benchmarks/readme_tables.py --check    # fail if it would change

A table stands between `<!-- table: NAME -->` and `<!-- end table -->`; NAME is that of a results
file without .json, and what is in front of its first "_" says which table is made of it.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from clip_lengths import pixel_frames
from fps_rows import PLAIN, Row, float32_errors, is_whole

from nova.config import NAMED_CONFIGS
from nova.data.clips import VIDEO_STRIDE

ROOT = Path(__file__).resolve().parent.parent
README, RESULTS = ROOT / "README.md", ROOT / "benchmarks" / "results"
START, END = re.compile(r"^<!-- table: (.*) -->$"), "<!-- end table -->"


class TableError(ValueError):
    """A block that cannot be filled."""


def rewrite(text: str, results: Path = RESULTS) -> str:
    """The text with all its tables made anew.

    Raises:
        TableError: a block without an end, or a name without results or table.
    """
    lines: list[str] = []
    name = None
    for line in text.splitlines():
        start = START.match(line)
        if start:
            if name is not None:
                raise TableError(f"table {name!r} has no {END!r}")
            name = start[1]
            lines += [line, *make_table(name, results)]
        elif line == END:
            if name is None:
                raise TableError(f"{END!r} stands without a table")
            name = None
        if name is None:
            lines.append(line)
    if name is not None:
        raise TableError(f"table {name!r} has no {END!r}")
    return "\n".join(lines) + "\n"


def make_table(name: str, results: Path = RESULTS) -> list[str]:
    """Lines of the table of a results file.

    Raises:
        TableError: there is no such file, no table for its kind, or something is missing in it.
    """
    kind = name.split("_")[0]
    file = results / f"{name}.json"
    if kind not in TABLES:
        raise TableError(f"no table for {name!r}; known kinds: {', '.join(TABLES)}")
    if not file.exists():
        raise TableError(f"no results for the table {name!r}: {file.name} is not there")
    try:
        return TABLES[kind](json.loads(file.read_text()))
    except KeyError as error:
        raise TableError(f"{file.name} has no {error}") from error
    except ValueError as error:
        raise TableError(f"{file.name}: {error}") from error


def fps_table(content: dict[str, Any]) -> list[str]:
    """Frames a second of all samplers, one line a geometry and batch; from benchmarks/fps.py.

    Raises:
        TableError: nothing was timed, or not the plain sampler.
    """
    rows = [row for row in content["rows"] if "refused" not in row]
    if not rows:
        raise TableError("no sampler was timed")
    samplers = list(dict.fromkeys(row["sampler"] for row in rows))
    has_floor = all("share_of_floor" in row for row in rows)
    header = ["geometry", "batch", *samplers]
    lines = _markdown_head(header + ["of floor"] * has_floor)
    for key, group in groupby(rows, key=lambda row: (_workload(row), row["batch"])):
        by_sampler = {row["sampler"]: row for row in group}
        plain = by_sampler.get(PLAIN)
        if plain is None:
            name, batch = key
            raise TableError(f"{PLAIN} was not timed for {name}, batch {batch}")
        cells = [_workload(plain), str(plain["batch"])]
        cells += [_speed(by_sampler.get(name)) for name in samplers]
        if has_floor:
            best = max(row["share_of_floor"] for row in by_sampler.values())
            cells.append(f"{100 * best:.0f} %")
        lines.append(_markdown_row(cells))
    counts = sorted({len(row["latencies_s"]) for row in rows})
    runs = " or ".join(str(count) for count in counts)
    error = max(row["max_error_vs_plain"] for row in rows)
    agreement = f"latents equal to {error:.0e}"
    in_half = float32_errors(rows)
    if in_half:
        agreement += f"; this package's error against float32 is {in_half}"
    dtype = rows[0]["dtype"]
    return [
        *lines,
        "",
        f"{_machine(content['machine'])}, {dtype}; medians of {runs} runs, in brackets their "
        f"range, and how many times as fast as plain; {agreement}. "
        f"`{content['command']}`",
    ]


def memory_table(content: Sequence[Row]) -> list[str]:
    """Peak memory, one line a measurement; from benchmarks/memory.py."""
    lines = _markdown_head(["what", "geometry", "peak"])
    for row in content:
        peak = f"{row['peak_memory_bytes'] / 1e9:.2g} GB"
        lines.append(_markdown_row([row["what"], row["geometry"], peak]))
    machines = {_machine(row["machine"]) for row in content}
    dtypes = {row["dtype"] for row in content}
    return [*lines, "", f"{'; '.join(sorted(machines))}, {', '.join(sorted(dtypes))}."]


TABLES: dict[str, Callable[[Any], list[str]]] = {"fps": fps_table, "memory": memory_table}


def _workload(row: Row) -> str:
    """Geometry, pixels, pixel frames and steps; how much of a video, if not all."""
    parts = []
    if row["geometry"] in NAMED_CONFIGS:
        height, width = NAMED_CONFIGS[row["geometry"]].image_size
        parts.append(f"{height} x {width} pixels")
    # Files that lack the factor are older than it, and of VAEs of the usual one.
    factor = row.get("temporal_factor", VIDEO_STRIDE)
    parts.append(f"{pixel_frames(row['latent_frames'], factor)} frames")
    parts.append(f"A = {row['steps']}, D = {row['diffusion_steps']}")
    name = f"{row['geometry']} ({', '.join(parts)})"
    if is_whole(row):
        return name
    return f"{name}, the first {row['sets_run']} of {row['sets_of_video']} sets"


def _speed(row: Row | None) -> str:
    """Frames a second, or of a part of a latent frame seconds, and how often that of plain."""
    if row is None:
        return "-"
    times = row["latencies_s"]
    slowest, fastest = max(times), min(times)
    if row["sets_run"] * row["latent_frames"] % row["sets_of_video"]:
        speed = f"{row['latency_s']:.1f} s ({fastest:.1f}-{slowest:.1f})"
    else:
        frames = row["fps"] * row["latency_s"]
        speed = f"{row['fps']:.1f} FPS ({frames / slowest:.1f}-{frames / fastest:.1f})"
    is_plain = row["sampler"] == PLAIN
    return speed if is_plain else f"{speed}, **{row['ratio_to_plain']:.2f} x**"


def _machine(facts: Row) -> str:
    where = facts["name"]
    if facts["device"] == "cpu":
        where += f", {facts['threads']} threads"
    return f"{where}, torch {facts['torch']}"


def _markdown_head(names: Sequence[str]) -> list[str]:
    return [_markdown_row(names), "|---" * len(names) + "|"]


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing, fail if it would")
    parser.add_argument("--readme", type=Path, default=README, help="the file with the tables")
    arguments = parser.parse_args()
    try:
        old = arguments.readme.read_text()
        new = rewrite(old)
    except (OSError, TableError) as error:
        parser.error(str(error))
    if new == old:
        return 0
    if arguments.check:
        print(f"{arguments.readme} is not in step: run {Path(__file__).name}", file=sys.stderr)
        return 1
    arguments.readme.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
