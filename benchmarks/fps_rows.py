"""What rows of fps.py say together."""

from collections.abc import Sequence
from typing import Any

from fps_samplers import PLAIN, PLAIN_COMPILED
from reference_package import DIFFNEXT

FLOAT32_ERROR = "error_vs_float32"
# Samplers that are not this package's.
PEERS = (PLAIN, PLAIN_COMPILED, DIFFNEXT)
Row = dict[str, Any]


def workload_name(row: Row) -> str:
    """Geometry and T, A, D of a row."""
    numbers = f"T={row['latent_frames']} A={row['steps']} D={row['diffusion_steps']}"
    return f"{row['geometry']} {numbers}"


def is_whole(row: Row) -> bool:
    """Whether a row is of a whole video, not of a part that counts as its share."""
    return row["sets_run"] == row["sets_of_video"]


def speeds(rows: Sequence[Row]) -> str:
    """Frames a second of the samplers of one batch size, in a line."""
    timed = [f"{row['sampler']} {row['fps']:.3g}" for row in rows if "fps" in row]
    return "; ".join(timed) or "none was timed"


def has_float32_error(row: Row) -> bool:
    """Whether a row was held against float32: in half precision, where memory sufficed."""
    return row.get(FLOAT32_ERROR) is not None


def float32_errors(rows: Sequence[Row]) -> str:
    """How far this package's samplers are from float32, in multiples of plain and of diffnext.

    Returns:
        Words such as "0.50 to 0.60 times that of plain"; "" where nothing can be compared.
    """
    rows = [row for row in rows if has_float32_error(row)]
    phrases = []
    for peer in (PLAIN, DIFFNEXT):
        errors = {_run_of(row): row[FLOAT32_ERROR] for row in rows if row["sampler"] == peer}
        times = [
            row[FLOAT32_ERROR] / errors[_run_of(row)]
            for row in rows
            if row["sampler"] not in PEERS and errors.get(_run_of(row))
        ]
        if times:
            phrases.append(f"{min(times):.2f} to {max(times):.2f} times that of {peer}")
    return ", ".join(phrases)


def _run_of(row: Row) -> tuple[str, int]:
    return workload_name(row), row["batch"]
