"""Registers, shared memory and occupancy of every Triton kernel, compiled for cards not here."""

import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from itertools import product
from multiprocessing import get_context
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

ARCHITECTURES = (80, 90)


def compile_rows(op: str | None = None) -> list[dict[str, Any]]:
    """Compile every case (of one op) for both architectures; a row for each.

    Keys: those of `ahead_of_time.Resources`, op, case, num_warps, real, and limit, the bytes of
    shared memory that a block of this architecture may have.
    """
    # In processes of their own, outside of Triton's interpreter.
    os.environ.pop("TRITON_INTERPRET", None)
    from nova_kernels.triton_kernels.compile_cases import compile_cases

    cases = [(i, case.op) for i, case in enumerate(compile_cases())]
    jobs = [(i, a) for (i, name), a in product(cases, ARCHITECTURES) if op in (None, name)]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        results = pool.map(_compile, *zip(*jobs, strict=True))
        return list(track(results, "compiling", total=len(jobs), console=Console(stderr=True)))


def _compile(index: int, architecture: int) -> dict[str, Any]:
    from nova_kernels.triton_kernels.ahead_of_time import LIMITS, compile_for
    from nova_kernels.triton_kernels.compile_cases import compile_cases

    case = list(compile_cases())[index]
    return {
        "op": case.op,
        "case": case.case,
        "real": case.real,
        "num_warps": case.launch.num_warps,
        "limit": LIMITS[architecture][2],
        **asdict(compile_for(case.launch, architecture)),
    }


def faults(row: dict[str, Any]) -> list[str]:
    """What is wrong with a compiled kernel: spills where they cost, too much shared memory."""
    found = []
    if row["real"] and row["costly_spills"]:
        found.append(f"{row['spills']} bytes spilled")
    if row["shared_memory"] > row["limit"]:
        found.append(f"{row['shared_memory']} bytes of shared memory, {row['limit']} allowed")
    return found


def print_compile_table(rows: list[dict[str, Any]]) -> None:
    table = Table(title="Triton kernels, compiled ahead of time")
    for name in ("kernel", "case", "sm"):
        table.add_column(name)
    for name in ("warps", "registers", "spills", "shared B", "occupancy"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row["kernel"].removesuffix("_kernel"),
            row["case"],
            str(row["architecture"]),
            str(row["num_warps"]),
            str(row["registers"]),
            str(row["spills"]),
            str(row["shared_memory"]),
            f"{row['occupancy']:.0%}",
            style="red" if faults(row) else None,
        )
    Console(width=130).print(table)
