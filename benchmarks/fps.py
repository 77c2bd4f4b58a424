"""Frames per second: the plain sampler against the exact one, same weights, same noise, one run.
On a GPU also the exact one from CUDA graphs, which its first run records.

    python benchmarks/fps.py
    python benchmarks/fps.py --geometry small-video --batch 1 4 --json fps.json

Plain is the sampling loops as the paper states them (nova/plain_sampling.py). Times are of sampling
alone: no text encoder, no VAE. On a CPU the released 0.6B geometry runs only the first sets of one
frame; its frames per second then count those sets as their share of a whole video's sets.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import (
    machine,
    peak_memory_bytes,
    relative_error,
    reset_peak_memory,
    timed,
    write_rows,
)
from random_model import RandomModelRun
from reference_package import ReferenceSampler, import_reference
from rich.console import Console
from rich.table import Table

from nova.devices import check_device
from nova.engine import SetGraphs
from nova.errors import NovaError
from nova.plain_sampling import generate_frames_plain
from nova.sampling import generate_frames
from nova_kernels.dispatch import BACKENDS

# Outputs of all samplers must agree with plain's to this relative error.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 2e-1}


@dataclass(frozen=True)
class Workload:
    """What is sampled: a named geometry, latent frames T, steps A and D.

    Attributes:
        num_sets: run only so many sets of one frame; None: the whole video.
        batches: default batch sizes.
        repeats: timed runs of each sampler.
    """

    geometry: str
    num_frames: int
    num_steps: int
    num_diffusion_steps: int
    num_sets: int | None = None
    batches: tuple[int, ...] = (1, 4)
    repeats: int = 5


CPU_WORKLOADS = (
    Workload("small-video", num_frames=5, num_steps=16, num_diffusion_steps=25),
    Workload(
        "nova-d48w1024-osp480", 9, 64, num_diffusion_steps=25, num_sets=2, batches=(1,), repeats=1
    ),
)
GPU_WORKLOADS = (
    CPU_WORKLOADS[0],
    Workload("nova-d48w1024-osp480", num_frames=9, num_steps=64, num_diffusion_steps=25),
)


def make_samplers(device: torch.device, against: str | None) -> dict[str, Callable]:
    """What is measured, by name: plain loops, the exact sampler, and it from CUDA graphs.

    Args:
        against: "diffnext" adds the reference package.

    Raises:
        ImportError: that package is not there.
    """
    samplers: dict[str, Callable] = {"plain": generate_frames_plain, "exact": generate_frames}
    if device.type == "cuda":
        samplers["graphs"] = partial(generate_frames, graphs=SetGraphs())
    if against is not None:
        samplers[against] = ReferenceSampler()
        samplers[f"{against}, accelerated"] = ReferenceSampler(accelerated=True)
    return samplers


def measure(
    workload: Workload,
    batch: int,
    device: torch.device,
    dtype: torch.dtype,
    backend: str,
    against: str | None = None,
) -> list[dict[str, Any]]:
    """Rows of all samplers for one workload and batch size; they take turns, `repeats` times."""
    run = RandomModelRun(
        workload.geometry,
        batch=batch,
        num_frames=workload.num_frames,
        num_steps=workload.num_steps,
        num_diffusion_steps=workload.num_diffusion_steps,
        num_sets=workload.num_sets,
        device=device,
        dtype=dtype,
        backend=backend,
    )
    samplers = make_samplers(device, against)
    latencies: dict[str, list[float]] = {name: [] for name in samplers}
    outputs, peaks = {}, {}
    for turn in range(workload.repeats):
        for name, sampler in samplers.items():
            reset_peak_memory(device)
            outputs[name], latency = timed(lambda s=sampler: run.sample(s), device)
            latencies[name].append(latency)
            peaks[name] = max(peaks.get(name, 0), peak_memory_bytes(device))
            if turn == 0 and workload.repeats > 1:
                # The first run warms up; its time does not count.
                _, latencies[name][0] = timed(lambda s=sampler: run.sample(s), device)
    plain = statistics.median(latencies["plain"])
    share = run.sets_run / run.sets_of_video
    pixel_frames = (1 + 4 * (workload.num_frames - 1)) * share
    geometry = f"{workload.geometry} T={workload.num_frames} A={workload.num_steps}"
    geometry += f" D={workload.num_diffusion_steps}"
    return [
        {
            "sampler": name,
            "geometry": geometry,
            "sets_run": run.sets_run,
            "sets_of_video": run.sets_of_video,
            "batch": batch,
            "device": str(device),
            "dtype": str(dtype).removeprefix("torch."),
            "backend": backend,
            "latency_s": statistics.median(times),
            "latencies_s": times,
            "fps": batch * pixel_frames / statistics.median(times),
            "ratio_to_plain": plain / statistics.median(times),
            "max_error_vs_plain": relative_error(outputs[name], outputs["plain"]),
            "peak_memory_bytes": peaks[name],
        }
        for name, times in latencies.items()
    ]


def print_table(rows: list[dict[str, Any]], facts: dict[str, Any]) -> None:
    title = f"Sampling on {facts['name']} ({facts['threads']} threads, torch {facts['torch']})"
    table = Table(title=title)
    for name in ("geometry", "sets", "batch", "sampler", "seconds", "spread"):
        table.add_column(name)
    for name in ("frames/s", "x plain", "error", "peak MB"):
        table.add_column(name, justify="right")
    for row in rows:
        times = row["latencies_s"]
        table.add_row(
            row["geometry"],
            f"{row['sets_run']} of {row['sets_of_video']}",
            str(row["batch"]),
            row["sampler"],
            f"{row['latency_s']:.2f}",
            f"{min(times):.2f}-{max(times):.2f}",
            f"{row['fps']:.3g}",
            f"{row['ratio_to_plain']:.2f}",
            f"{row['max_error_vs_plain']:.1e}",
            f"{row['peak_memory_bytes'] / 2**20:.0f}",
        )
    Console(width=None if sys.stdout.isatty() else 150).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--geometry", help="only this one, such as small-video")
    parser.add_argument("--batch", type=int, nargs="+", help="batch sizes; default: by geometry")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default=None, choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--backend", default="auto", choices=BACKENDS, help="of the ops")
    parser.add_argument(
        "--against", choices=["diffnext"], help="the reference package, where it can be imported"
    )
    parser.add_argument("--repeats", type=int, help="timed runs of each sampler")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    arguments = parser.parse_args()
    try:
        device = check_device(arguments.device)
        if arguments.against is not None:
            import_reference()
    except NovaError as error:
        parser.error(str(error))
    except ImportError as error:
        parser.error(f"--against diffnext: {error}; see benchmarks/reference_package.py")
    default_dtype = "bfloat16" if device.type == "cuda" else "float32"
    dtype = getattr(torch, arguments.dtype or default_dtype)
    workloads = GPU_WORKLOADS if device.type == "cuda" else CPU_WORKLOADS
    if arguments.geometry is not None:
        workloads = tuple(w for w in workloads if w.geometry == arguments.geometry)
        if not workloads:
            parser.error(f"no workload for {arguments.geometry!r}")
    facts = machine(device)
    rows = []
    for workload in workloads:
        if arguments.repeats is not None:
            workload = Workload(**{**vars(workload), "repeats": arguments.repeats})
        for batch in arguments.batch or workload.batches:
            print(f"sampling {workload.geometry}, batch {batch} ...", file=sys.stderr, flush=True)
            rows += measure(workload, batch, device, dtype, arguments.backend, arguments.against)
    print_table(rows, facts)
    if arguments.json:
        write_rows(arguments.json, "fps.py", facts, rows)
    wrong = [row for row in rows if not row["max_error_vs_plain"] <= TOLERANCES[dtype]]
    for row in wrong:
        print(f"{row['sampler']} differs from plain: {row}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
