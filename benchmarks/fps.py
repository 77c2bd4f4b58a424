"""Frames per second of all samplers: same weights, same noise, one run.

    python benchmarks/fps.py
    python benchmarks/fps.py --geometry small-video --batch 1 4 --json fps.json --plot fps.png
    python benchmarks/fps.py --steps 128 --diffusion-steps 100      # the slower, better preset
    python benchmarks/fps.py --model shapes                         # a checkpoint's weights

Plain is the sampling loops as the paper states them (nova/plain_sampling.py), exact this package's
(nova/sampling.py); on a GPU also both with torch.compile, exact from CUDA graphs, and those after
nova.tune. On a CPU released geometries, if asked for, run only the first sets of one frame; their
frames per second count those sets as their share of a whole video's. docs/benchmarks.md describes
what is measured.
"""

import argparse
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from argument_types import positive_float
from card_facts import card_facts
from ceilings import measure_ceilings
from fps_measure import measure
from fps_plot import check_plot, plot
from fps_rows import Row, speeds
from fps_samplers import make_samplers
from fps_table import print_tables
from fps_workloads import choose_workloads
from measure import check_file, is_lost, keep_rows, machine
from reference_package import DIFFNEXT, import_reference

from nova.devices import check_device, free_memory, is_out_of_memory
from nova.errors import NovaError
from nova_kernels.dispatch import BACKENDS
from nova_kernels.errors import BackendError


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("--geometry", nargs="+", help="these alone, such as small-video nova-d48w1024-osp480")
    add("--model", help="this one alone: a checkpoint's folder or hub id, or shapes")
    add("--batch", type=int, nargs="+", help="batch sizes; default: by geometry")
    add("--latents", type=int, help="latent frames T")
    add("--steps", type=int, help="autoregressive steps A of a frame")
    add("--diffusion-steps", type=int, help="diffusion steps D")
    add(
        "--run-latents",
        type=int,
        help="run only so many latent frames, which count as their share of a video; default: all, "
        "of released geometries as many as the plain sampler makes in 10 seconds",
    )
    add("--sets", type=int, help="run only so many sets of the first frame")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=["float32", "bfloat16", "float16"])
    add("--backend", default="auto", choices=BACKENDS, help="of the ops")
    add("--compile", action=switch, help="also with torch.compile; default: on a GPU")
    add("--reference-ops", action="store_true", help="also exact with plain torch for every op")
    add("--progress", action="store_true", help="also exact with progress bars: what they cost")
    add("--tune", action=switch, help="also exact after nova.tune; default: on a GPU")
    add("--against", choices=[DIFFNEXT], help="the reference package, if it can be imported")
    add("--text", action=switch, help="time the text encoder too; default: on a GPU")
    add("--vae", action=switch, help="decode too; default: on a GPU")
    add("--stages", action=switch, default=True, help="measure stages in a run of their own")
    add("--repeats", type=int, help="timed runs of each sampler")
    add(
        "--seconds",
        type=positive_float,
        help="begin no third or later turn of the samplers after so many, at one batch size; "
        "default: 120 on a GPU, 20 on a CPU, with --repeats none",
    )
    add("--json", type=Path, help="write the rows to this file")
    add("--plot", type=Path, help="draw them into this file, such as fps.png")
    return parser


class Results:
    """All rows, in the file as soon as they are there: what comes later may not end well.

    Args:
        path: of the results file; None: there is none.
        facts: of the machine.

    Attributes:
        rows: of batch sizes that are finished.
        is_written: whether the file has all rows there were, or there is to be none.
    """

    def __init__(self, path: Path | None, facts: dict[str, Any]):
        self.rows: list[Row] = []
        self.is_written = True
        self._of_batch: list[Row] = []
        self._path, self._facts = path, facts

    def keep(self, rows: list[Row]) -> None:
        """These are the rows of the batch size at hand so far."""
        self._of_batch = rows
        if self._path is not None:
            self.is_written = keep_rows(self._path, "fps.py", self._facts, self.rows + rows)

    def finish_batch(self) -> list[Row]:
        """What comes is of another batch size. Returns the rows of this one."""
        finished, self._of_batch = self._of_batch, []
        self.rows = self.rows + finished
        return finished


def main() -> int:
    parser = build_parser()
    arguments = parser.parse_args()
    try:
        device = check_device(arguments.device)
        workloads = choose_workloads(
            device.type,
            geometries=arguments.geometry,
            model=arguments.model,
            batches=arguments.batch,
            text=arguments.text,
            vae=arguments.vae,
            num_frames=arguments.latents,
            num_steps=arguments.steps,
            num_diffusion_steps=arguments.diffusion_steps,
            num_sets=arguments.sets,
            run_frames=arguments.run_latents,
            repeats=arguments.repeats,
        )
        if arguments.plot:
            check_plot(arguments.plot)
        if arguments.against is not None:
            import_reference()
        for path in (arguments.json, arguments.plot):
            if path is not None:
                check_file(path)
    except NovaError as error:
        parser.error(str(error))
    except ImportError as error:
        parser.error(f"--against {DIFFNEXT}: {error}; see benchmarks/reference_package.py")
    on_gpu = device.type == "cuda"
    # In float32 torch rounds what convolutions on a GPU read, not what matrix products read. The
    # plain sampler embeds tokens by the former, the others by the latter, and would seem wrong.
    torch.backends.cudnn.allow_tf32 = False
    dtype = getattr(torch, arguments.dtype or ("bfloat16" if on_gpu else "float32"))
    seconds = arguments.seconds
    if seconds is None and arguments.repeats is None:
        seconds = 120.0 if on_gpu else 20.0
    ceilings = measure_ceilings(device, dtype)
    # Right after the products, so that clocks are those of work.
    facts = machine(device) | card_facts(device) | ceilings.facts()
    results = Results(arguments.json, facts)
    failed = False
    for workload in workloads:
        for batch in workload.batches:
            print(f"sampling {workload.geometry}, batch {batch} ...", file=sys.stderr, flush=True)
            samplers = make_samplers(
                device,
                compiled=on_gpu if arguments.compile is None else arguments.compile,
                reference_ops=arguments.reference_ops,
                progress=arguments.progress,
                tuned=on_gpu if arguments.tune is None else arguments.tune,
                against_diffnext=arguments.against == DIFFNEXT,
            )
            try:
                measure(
                    workload,
                    batch,
                    samplers,
                    ceilings,
                    device=device,
                    dtype=dtype,
                    backend=arguments.backend,
                    stages=arguments.stages,
                    seconds=seconds,
                    say=lambda line: print(f"  {line}", file=sys.stderr, flush=True),
                    keep=results.keep,
                )
            except (NovaError, BackendError) as error:
                # Others may be measured all the same.
                print(f"cannot be measured: {error}", file=sys.stderr, flush=True)
                failed = True
            except RuntimeError as error:
                if is_lost(device):
                    raise
                if is_out_of_memory(error):
                    print("not enough memory", file=sys.stderr, flush=True)
                else:  # such as of a kernel
                    traceback.print_exc()
                    failed = True
            finished = results.finish_batch()
            print(f"  frames a second: {speeds(finished)}", file=sys.stderr, flush=True)
            # The graphs and their models, which would count as memory of the next samplers.
            del samplers
            free_memory(device)
    rows = results.rows
    if not rows:
        return 1
    print_tables(rows, facts)
    if arguments.plot:
        plot(arguments.plot, rows, f"Sampling on {facts['name']}, torch {facts['torch']}")
    failed |= any(row.get("refused", "").startswith(("wrong", "failed")) for row in rows)
    return 1 if failed or not results.is_written else 0


if __name__ == "__main__":
    sys.exit(main())
