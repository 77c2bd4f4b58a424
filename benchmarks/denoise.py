"""The denoise loop of a set: microseconds a step, by one launch and by many.

    python benchmarks/denoise.py                        # on a GPU: measure; without: predict
    python benchmarks/denoise.py --cpu --width 256      # measure on the CPU
    python benchmarks/denoise.py --width 768 --tokens 4,22 --json denoise.json

Random weights, guidance, the flow-matching schedule. An implementation is timed only after its
result was as exact as plain torch's. "graph" is the sequence of launches captured in a CUDA graph,
which is what one launch has to beat.
"""

import argparse
import copy
import dataclasses
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from argument_types import positive_int, positive_ints
from denoise_costs import DATA_SHEET_CARDS, step_cost
from measure import is_lost, keep_rows, machine, relative_error, results_file, timed, write_rows
from rich.console import Console
from rich.table import Table
from torch import Tensor

import nova_kernels
from nova.graph_recording import CUDARecorder
from nova.head import DiffusionMLP, PreparedHead
from nova.schedule import FlowMatchConfig
from nova_kernels.cpp_kernels import extension as cpp_extension
from nova_kernels.cuda_kernels import denoise as persistent
from nova_kernels.cuda_kernels import extension
from nova_kernels.cuda_kernels.denoise_plan import (
    CLUSTER_SIZES,
    DenoiseShape,
    obstacle_of_memory,
    plan_denoise,
)
from nova_kernels.cuda_kernels.denoise_plan import obstacle as obstacle_of_shape
from nova_kernels.errors import in_a_line
from nova_kernels.ops.denoise import modulate

PASSES, GUIDANCE = 2, 5.0
CONDITION_DIM, PATCH_SIZE = 1024, 2
ALLOWED = 2.0
FLOORS = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-3}
REPETITIONS = 20
# Makes a call, which may take compiling or recording; None: there is none for these sizes.
Make = Callable[[], Callable[[], Tensor] | None]


class Loop:
    """A head with random weights, and its inputs.

    Args:
        mlp: the head.
        x: (1, tokens, token_dim) noise.
        z: (PASSES, 1, tokens, CONDITION_DIM), of the image encoder.
        num_steps: of the flow-matching schedule.
    """

    def __init__(self, mlp: DiffusionMLP, x: Tensor, z: Tensor, num_steps: int):
        self.mlp, self.x, self.z, self.num_steps = mlp, x, z, num_steps
        schedule = FlowMatchConfig().schedule(num_steps)
        self.steps = [
            nova_kernels.StepCoefficients(*numbers, guidance=GUIDANCE)
            for numbers in zip(schedule.sample, schedule.prediction, schedule.noise, strict=True)
        ]
        head = PreparedHead(mlp, torch.tensor(schedule.timesteps, device=x.device))
        self.weights, self.times = head.weights, head.time_embeddings
        self.condition = head.condition(z)

    @classmethod
    def random(
        cls, shape: DenoiseShape, num_steps: int, device: torch.device, dtype: torch.dtype
    ) -> "Loop":
        """From seed 0."""
        torch.manual_seed(0)
        channels = shape.token_dim // PATCH_SIZE**2
        mlp = DiffusionMLP(shape.depth, shape.width, CONDITION_DIM, PATCH_SIZE, channels)
        x = torch.randn(1, shape.tokens, shape.token_dim)
        z = torch.randn(PASSES, 1, shape.tokens, CONDITION_DIM)
        to = device, dtype
        return cls(mlp.to(*to).requires_grad_(False), x.to(*to), z.to(*to), num_steps)

    def in_float64(self) -> "Loop":
        """The same numbers in float64."""
        mlp = copy.deepcopy(self.mlp).double()
        return Loop(mlp, self.x.double(), self.z.double(), self.num_steps)

    def run(self, backend: str) -> Tensor:
        return nova_kernels.denoise(
            self.x, self.condition, self.times, self.weights, self.steps, backend=backend
        )


def by_many_launches(loop: Loop, shape: DenoiseShape) -> dict[str, Make]:
    """What makes a call that computes a loop on the device that it is on, by name."""
    makes = {"eager": lambda: partial(loop.run, "reference")}
    if not loop.x.is_cuda:
        if cpp_extension.obstacle() is None:
            makes["C++"] = lambda: partial(loop.run, "cpp")
        return makes
    makes["Triton"] = lambda: partial(loop.run, "triton")
    graphs = {f"{name}, graph": partial(captured, make()) for name, make in makes.items()}
    return makes | graphs


def by_one_launch(loop: Loop, shape: DenoiseShape) -> dict[str, Make]:
    """The same for the persistent kernel, by the size of its clusters."""
    x, steps = loop.x, loop.steps
    if not x.is_cuda:
        return {}
    as_called: dict[str, Make] = {"one launch": lambda: partial(loop.run, "cuda")}
    try:
        if persistent.obstacle(x, loop.condition, loop.weights, steps, None) is not None:
            return {}
    except RuntimeError:  # no extension, or one that CUDA refuses: the call will say so
        return as_called
    graphs = {
        f"one launch, clusters of {size}, graph": partial(one_launch, loop, shape, size)
        for size in CLUSTER_SIZES
    }
    return graphs | as_called


def one_launch(loop: Loop, shape: DenoiseShape, cluster_size: int) -> Callable[[], Tensor] | None:
    """The persistent kernel in one division, in a graph; None where the card does not have it."""
    weights, x = loop.weights, loop.x
    limits = persistent.device_limits(extension.extension(), x.device, x.dtype, PASSES)
    clusters = {cluster_size: limits.clusters[cluster_size]}
    plan = plan_denoise(shape, dataclasses.replace(limits, clusters=clusters))
    if plan is None:
        return None

    def run() -> Tensor:
        vectors = modulate(weights, loop.condition, loop.times)
        return persistent.run(x, vectors, weights, loop.steps, plan=plan)

    return captured(run)


def captured(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The same, as a replayed CUDA graph."""
    call()  # compiles
    recording = CUDARecorder()(call)

    def replay() -> Tensor:
        recording.replay()
        return recording.output

    return replay


def microseconds(call: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Median and spread (largest minus smallest) of a call; on a GPU by its own clock."""
    if device.type == "cpu":
        times = [1e6 * timed(call, device)[1] for _ in range(REPETITIONS + 3)][3:]
        return statistics.median(times), max(times) - min(times)
    times = []
    for _ in range(REPETITIONS + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        call()  # keeps the GPU busy while what is timed is launched, which would count otherwise
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(1e3 * begin.elapsed_time(end))
    times = times[3:]
    return statistics.median(times), max(times) - min(times)


def measure(
    shapes: list[DenoiseShape], num_steps: int, device: torch.device, dtype: torch.dtype
) -> Iterator[dict[str, Any]]:
    """A row for every shape and implementation, until the device is lost.

    The persistent kernel comes last: its blocks wait for each other, and for ever if it is wrong.
    """
    loops = [Loop.random(shape, num_steps, device, dtype) for shape in shapes]
    exact = [loop.in_float64().run("reference") for loop in loops]
    for implementations in (by_many_launches, by_one_launch):
        for shape, loop, right in zip(shapes, loops, exact, strict=True):
            of_torch = relative_error(loop.run("reference"), right)
            for name, make in implementations(loop, shape).items():
                row = {"tokens": shape.tokens, "rows": shape.rows, "implementation": name}
                try:
                    call = make()
                    if call is None:
                        continue
                    yield row | _figures(call, right, of_torch, num_steps)
                except Exception as problem:  # of a card or a compiler: others are measured
                    yield row | {"refused": f"failed: {in_a_line(problem)}"}
                    if is_lost(device):
                        print(f"the GPU refuses all work after {name}", file=sys.stderr)
                        return


def _figures(
    call: Callable[[], Tensor], right: Tensor, of_torch: float, num_steps: int
) -> dict[str, Any]:
    """Of a call whose result was as exact as plain torch's, whose error is `of_torch`."""
    result = call()
    error = relative_error(result, right)
    if not error <= ALLOWED * of_torch + FLOORS[result.dtype]:
        return {"refused": f"wrong: error {error:.1e}, torch's {of_torch:.1e}"}
    median, spread = microseconds(call, right.device)
    return {
        "error": error,
        "microseconds_a_step": median / num_steps,
        "spread": spread / num_steps,
    }


def predict(shape: DenoiseShape) -> list[dict[str, Any]]:
    """A row for every card of `denoise_costs`: counted, not measured."""
    rows = []
    for card in DATA_SHEET_CARDS:
        row = {"tokens": shape.tokens, "rows": shape.rows, "card": card.name}
        reason = obstacle_of_shape(shape) or obstacle_of_memory(shape, card.limits)
        if reason is not None:
            rows.append(row | {"refused": reason})
            continue
        cost = step_cost(shape, card)
        rows.append(
            row
            | {
                "blocks": cost.plan.clusters * cost.plan.cluster_size,
                "cluster_size": cost.plan.cluster_size,
                "weights": "streamed" if cost.weight_bytes else "on the chip",
                "weight_MB": cost.weight_bytes / 1e6,
                "activation_MB": cost.activation_bytes / 1e6,
                "modulation_MB": cost.modulation_bytes / 1e6,
                "barriers": cost.barriers,
                "floor_us": 1e6 * cost.floor,
                "predicted_us": 1e6 * cost.seconds,
            }
        )
    return rows


def print_rows(rows: list[dict[str, Any]], title: str) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(title=title)
    for column in columns:
        table.add_column(column.replace("_", " "))
    for row in rows:
        table.add_row(*(_cell(row.get(column, "")) for column in columns))
    Console(width=150).print(table)


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=positive_int, default=1280)
    parser.add_argument("--depth", type=positive_int, default=3)
    parser.add_argument("--token-dim", type=positive_int, default=16)
    parser.add_argument(
        "--tokens",
        type=positive_ints,
        default=[2, 11, 22, 36, 64],
        help="tokens of the set, one or several, such as 2,11",
    )
    parser.add_argument("--steps", type=positive_int, default=25, help="denoise steps")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--cpu", action="store_true", help="measure on the CPU, in float32")
    parser.add_argument("--json", type=results_file, help="write the rows to this file")
    arguments = parser.parse_args()
    on_gpu = torch.cuda.is_available() and not arguments.cpu
    device = torch.device("cuda" if on_gpu else "cpu")
    dtype = torch.float32 if arguments.cpu else getattr(torch, arguments.dtype)
    shapes = [
        DenoiseShape(n, PASSES, arguments.width, arguments.depth, arguments.token_dim)
        for n in arguments.tokens
    ]
    if arguments.token_dim % PATCH_SIZE**2:
        parser.error(f"--token-dim must be a multiple of {PATCH_SIZE**2}")
    facts = machine(device)
    sizes = f"width {arguments.width}, depth {arguments.depth}, {PASSES} passes"
    with torch.no_grad():
        if on_gpu or arguments.cpu:
            rows = []
            for row in measure(shapes, arguments.steps, device, dtype):
                rows.append(row)
                if arguments.json:  # what there is, in case that a later one does not end well
                    keep_rows(arguments.json, "denoise.py", facts, rows)
            rows.sort(key=lambda row: row["tokens"])
            print_rows(rows, f"A denoise step on {facts['name']}: {sizes}")
        else:
            rows = [row for s in shapes for row in predict(s)]
            print_rows(rows, f"A denoise step in one launch, counted and predicted: {sizes}")
            print("No GPU here: nothing was timed.")
    if arguments.json:
        write_rows(arguments.json, "denoise.py", facts, rows)
    return 1 if any("refused" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
