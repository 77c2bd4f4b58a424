"""Which kernels take the time of sampling: one latent frame under torch's profiler.

    python benchmarks/kernel_times.py                        # the released 0.6B model on a GPU
    python benchmarks/kernel_times.py --trace trace.json.gz  # for https://ui.perfetto.dev

Where kernels together take less than the run, the GPU waited: for launches, or for the host. On a
CPU these are torch's operators, of the small geometry, each without the operators inside it.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from card_facts import card_facts
from fps_samplers import EXACT, GRAPHS, PLAIN, TUNED, make_samplers
from fps_workloads import RELEASED, SMALL, choose_workloads
from measure import check_file, machine, timed, write_rows
from random_model import RandomModelRun
from rich.console import Console
from rich.table import Table
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from nova.devices import check_device
from nova.errors import NovaError
from nova.graph_recording import RecordingError
from nova_kernels.dispatch import BACKENDS
from nova_kernels.errors import BackendError

SHOWN = 25


def kernel_times(
    run: RandomModelRun, sampler: Any, device: torch.device, trace: Path | None = None
) -> tuple[list[dict[str, Any]], float]:
    """What a run launches, by name, the longest first.

    Args:
        sampler: as of `make_samplers`; it runs once before, to compile and record.
        trace: file for the profiler's time line; None: none.

    Returns:
        Rows of name, calls and milliseconds; and the milliseconds of the run, profiled.
    """
    run.sample(sampler)
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        _, seconds = timed(lambda: run.sample(sampler), device)
    if trace is not None:
        profiler.export_chrome_trace(str(trace))
    rows = []
    for entry in profiler.key_averages():
        if on_gpu and entry.device_type != DeviceType.CUDA:
            continue
        microseconds = entry.self_device_time_total if on_gpu else entry.self_cpu_time_total
        rows.append({"name": entry.key, "calls": entry.count, "ms": microseconds / 1e3})
    return sorted(rows, key=lambda row: -row["ms"]), 1e3 * seconds


def print_rows(rows: list[dict[str, Any]], run_ms: float, title: str) -> None:
    table = Table(title=title)
    for column in ("kernel or operator", "calls", "ms", "each, us", "of the run"):
        table.add_column(column, justify="left" if column.startswith("kernel") else "right")
    shown = rows[:SHOWN]
    rest, together = rows[SHOWN:], sum(row["ms"] for row in rows)
    for row in shown:
        _add(table, row["name"][:90], row["calls"], row["ms"], run_ms)
    if rest:
        name = f"{len(rest)} others"
        _add(table, name, sum(row["calls"] for row in rest), sum(row["ms"] for row in rest), run_ms)
    _add(table, "together", sum(row["calls"] for row in rows), together, run_ms)
    Console(width=140).print(table)
    print(f"The run took {run_ms:.4g} ms, profiled.")


def _add(table: Table, name: str, calls: int, ms: float, run_ms: float) -> None:
    each = 1e3 * ms / max(calls, 1)
    table.add_row(name, str(calls), f"{ms:.4g}", f"{each:.3g}", f"{100 * ms / run_ms:.1f} %")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--geometry", help="default: the released 0.6B model, small on a CPU")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--sampler", choices=[PLAIN, EXACT, GRAPHS, TUNED], help="see fps.py")
    parser.add_argument("--run-latents", type=int, help="latent frames to run; default: 1")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--backend", default="auto", choices=BACKENDS, help="of the ops")
    parser.add_argument("--trace", type=Path, help="write the profiler's time line to this file")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    arguments = parser.parse_args()
    try:
        device = check_device(arguments.device)
        on_gpu = device.type == "cuda"
        for path in (arguments.trace, arguments.json):
            if path is not None:
                check_file(path)
        name = arguments.sampler or (GRAPHS if on_gpu else EXACT)
        samplers = make_samplers(device, tuned=True)
        if name not in samplers:
            parser.error(f"--sampler {name} needs a GPU; this runs on {device}")
        [workload] = choose_workloads(
            device.type,
            geometries=[arguments.geometry or (RELEASED if on_gpu else SMALL).geometry],
            batches=[arguments.batch],
            run_frames=arguments.run_latents,
        )
        dtype = getattr(torch, arguments.dtype or ("bfloat16" if on_gpu else "float32"))
        run = RandomModelRun(
            workload.geometry,
            batch=arguments.batch,
            num_frames=workload.num_frames,
            num_steps=workload.num_steps,
            num_diffusion_steps=workload.num_diffusion_steps,
            num_sets=workload.num_sets,
            run_frames=workload.run_frames or 1,
            device=device,
            dtype=dtype,
            backend=arguments.backend,
        )
        rows, run_ms = kernel_times(run, samplers[name], device, arguments.trace)
    except (NovaError, BackendError, RecordingError) as error:
        parser.error(str(error))
    facts = machine(device) | card_facts(device)
    what = f"{workload.geometry}, batch {arguments.batch}, {run.sets_run} sets, {name}"
    print_rows(rows, run_ms, f"{what}, on {facts['name']}")
    if arguments.json:
        facts |= {"run": what, "dtype": str(dtype).removeprefix("torch."), "run_ms": run_ms}
        write_rows(arguments.json, "kernel_times.py", facts, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
