"""The ops: right first, then time, bandwidth and arithmetic beside what else computes them.

    python benchmarks/op_times.py                      # on a GPU: measure; on a CPU: what they cost
    python benchmarks/op_times.py --op residual_norm --json op_times.json
    python benchmarks/op_times.py --compile-report     # registers, shared memory, occupancy; no GPU

A case is timed only after its results, and its gradients, were as exact as plain torch's. Ceilings
are the card's own, measured in the same run: a copy for bytes, a matrix product for operations.
Forward passes are timed in a CUDA graph, which is how the sampler runs them, and called from Python
too; backward passes only so, which is how training runs them.
"""

import argparse
import statistics
import sys
from importlib import import_module
from typing import Any

import torch
from ceilings import Ceilings, measure_ceilings
from compile_report import compile_rows, faults, print_compile_table
from graph_times import graph_microseconds
from kernel_cases import KernelCase, kernel_cases
from kernel_table import print_times
from measure import is_lost, keep_rows, machine, relative_error, results_file, write_rows
from rich.console import Console
from rich.table import Table
from torch import Tensor

from nova_kernels.errors import BackendError, in_a_line

BACKENDS = ("reference", "triton", "cuda")
BY_TORCH_COMPILE = ("torch.compile", "FlexAttention")
DIRECTIONS = ("forward", "backward")
# Bytes and half-precision operations a second, of the cards' data sheets (80 GB A100, SXM H200).
DATA_SHEETS = {"A100": (2.039e12, 312e12), "H200": (4.8e12, 989e12)}
# Errors relative to torch's own, and what counts as no error.
ALLOWED, FLOOR = 2.0, {torch.float32: 1e-6, torch.float16: 2e-4, torch.bfloat16: 2e-3}


def costs(case: KernelCase, direction: str, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes that must move, and operations of matrix products."""
    index = DIRECTIONS.index(direction)
    return (case.elements[index] or 0) * dtype.itemsize, case.operations[index]


def directions(case: KernelCase) -> list[str]:
    return [d for d, n in zip(DIRECTIONS, case.elements, strict=True) if n is not None]


def floor_rows(cases: list[KernelCase], dtype: torch.dtype) -> list[dict[str, Any]]:
    """What every case costs, and the least time for it on each card by its data sheet."""
    rows = []
    for case in cases:
        for direction in directions(case):
            moved, operations = costs(case, direction, dtype)
            floors = {
                f"{card}_floor_us": 1e6 * max(moved / bandwidth, operations / rate)
                for card, (bandwidth, rate) in DATA_SHEETS.items()
            }
            rows.append(
                {
                    "op": case.op,
                    "shape": case.shape,
                    "direction": direction,
                    "bytes": moved,
                    "operations": operations,
                    **floors,
                }
            )
    return rows


def print_floors(rows: list[dict[str, Any]], dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    table = Table(title=f"What the ops cost in {name}: least times by data sheet, in microseconds")
    for column in ("op", "shape", "direction"):
        table.add_column(column)
    for column in ("MB", "GFLOP", *DATA_SHEETS):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row["op"],
            row["shape"],
            row["direction"],
            f"{row['bytes'] / 1e6:.3g}",
            f"{row['operations'] / 1e9:.3g}",
            *(f"{row[f'{card}_floor_us']:.1f}" for card in DATA_SHEETS),
        )
    Console(width=130).print(table)


def implementations(case: KernelCase, *, compiled: bool = True) -> dict[str, Any]:
    """Everything that computes a case, by name; if `compiled`, what torch.compile makes too."""
    written = import_module(f"nova_kernels.ops.{case.op}").OP.implementations
    names = [name for name in BACKENDS if name in ("reference", *written)]
    ours = {name: lambda *t, name=name: case.run(name, *t) for name in names}
    by_compiler = {"torch.compile": torch.compile(ours["reference"])} if case.is_compiled else {}
    calls = {**ours, **by_compiler, **case.peers, **case.forward_peers}
    return {name: calls[name] for name in calls if compiled or name not in BY_TORCH_COMPILE}


def outputs(call: Any, inputs: list[Tensor], backward: bool) -> list[Tensor]:
    """The result, and with `backward` the gradients of all inputs that have one."""
    result = call(*inputs)
    if not backward:
        return [result]
    generator = torch.Generator(result.device).manual_seed(1)
    # The same numbers for all dtypes.
    grad = torch.randn(result.shape, generator=generator, device=result.device).to(result)
    leaves = [t for t in inputs if t.requires_grad]
    # Kept, since torch.compile makes a backward pass that can be repeated, as `time_of` does, only
    # if the graph is kept when it first runs.
    gradients = torch.autograd.grad(result, leaves, grad, retain_graph=True)
    return [result.detach(), *gradients]


def gate(
    case: KernelCase, calls: dict[str, Any], device: torch.device, dtype: torch.dtype
) -> dict[str, str]:
    """Why an implementation may not be timed: name -> reason. Empty: all are right."""
    backward = "backward" in directions(case)
    inputs = make_inputs(case, device, dtype, backward)
    exact_inputs = [t.detach().double().requires_grad_(t.requires_grad) for t in inputs]
    exact = outputs(calls["reference"], exact_inputs, backward)
    by_torch = outputs(calls["reference"], inputs, backward)
    torch_errors = [relative_error(*pair) for pair in zip(by_torch, exact, strict=True)]
    del by_torch
    refused = {}
    for name, call in calls.items():
        try:
            differentiable = backward and name not in case.forward_peers
            results = outputs(call, inputs, differentiable)
            wanted = exact if differentiable else exact[:1]
            errors = [relative_error(*pair) for pair in zip(results, wanted, strict=True)]
        except BackendError as error:
            refused[name] = str(error)
            continue
        except Exception as error:  # whatever compilers and libraries raise on some card
            verdict = "wrong" if name in BACKENDS else "failed"
            refused[name] = f"{verdict}: {in_a_line(error)}"
            if is_lost(device):
                break
            continue
        for error, of_torch in zip(errors, torch_errors[: len(errors)], strict=True):
            if not error <= ALLOWED * of_torch + FLOOR[dtype]:
                refused[name] = f"wrong: error {error:.1e}, torch's is {of_torch:.1e}"
    return refused


def make_inputs(
    case: KernelCase, device: torch.device, dtype: torch.dtype, backward: bool
) -> list[Tensor]:
    """A case's inputs, with `backward` as leaves that ask for gradients."""
    inputs = case.make(device, dtype)
    for tensor in inputs[: len(inputs) - case.num_tables]:
        tensor.requires_grad_(backward)
    return inputs


def milliseconds(call: Any) -> float:
    """Median time of a call outside of graphs, on the GPU's clock, caches flushed before each.

    Where the GPU waits for the host, that counts.
    """
    from triton.testing import do_bench

    return statistics.median(do_bench(call, warmup=25, rep=100, return_mode="all"))


def measure(
    case: KernelCase,
    device: torch.device,
    dtype: torch.dtype,
    limits: Ceilings,
    *,
    compiled: bool = True,
) -> list[dict[str, Any]]:
    """Rows of all implementations of a case, or of those until the device was lost."""
    # Else torch compiles later cases for any shape, and after some of them not at all.
    torch.compiler.reset()
    calls = implementations(case, compiled=compiled)
    refused = gate(case, calls, device, dtype)
    rows = [
        {"op": case.op, "shape": case.shape, "implementation": name, "refused": reason}
        for name, reason in refused.items()
    ]
    if is_lost(device):
        return rows
    for direction in directions(case):
        moved, operations = costs(case, direction, dtype)
        floor = max(moved / limits.bandwidth, operations / limits.rate)
        for name, call in calls.items():
            if name in refused or (direction == "backward" and name in case.forward_peers):
                continue
            row = {
                "op": case.op,
                "shape": case.shape,
                "implementation": name,
                "direction": direction,
            }
            try:
                times = times_of(case, call, direction, device, dtype)
            except Exception as error:  # of a card or a compiler, such as too little memory
                rows.append(row | {"refused": f"failed: {in_a_line(error)}"})
                if is_lost(device):
                    return rows
                continue
            seconds = times["microseconds"] / 1e6
            rows.append(
                row
                | times
                | {
                    "GB_per_s": moved / seconds / 1e9,
                    "TFLOP_per_s": operations / seconds / 1e12,
                    "share_of_ceiling": floor / seconds,
                }
            )
            if "no_graph" in times and is_lost(device):
                return rows
    return rows


def times_of(
    case: KernelCase, call: Any, direction: str, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Times of one direction of one implementation, for its row.

    Returns:
        "microseconds", and whether they were "timed" in a "graph" or "eager"; "eager_us"; and as
        "no_graph" why a forward pass has no time in a graph.
    """
    backward = direction == "backward"
    inputs = make_inputs(case, device, dtype, backward)
    if backward:
        result = call(*inputs)
        leaves, grad = [t for t in inputs if t.requires_grad], torch.randn_like(result)
        # Training runs no graphs.
        return _eager(lambda: torch.autograd.grad(result, leaves, grad, retain_graph=True))
    with torch.no_grad():
        times = _eager(lambda: call(*inputs))
        try:
            in_graph = graph_microseconds(lambda: call(*inputs), times["eager_us"])
        except Exception as error:  # not all that libraries do can be captured
            return times | {"no_graph": in_a_line(error)}
    return times | {"microseconds": in_graph, "timed": "graph"}


def _eager(call: Any) -> dict[str, Any]:
    time = 1e3 * milliseconds(call)
    return {"microseconds": time, "timed": "eager", "eager_us": time}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = sorted({case.op for case in kernel_cases()})
    parser.add_argument("--op", choices=names, help="only this one")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also what torch.compile makes, FlexAttention too; it takes minutes",
    )
    parser.add_argument("--compile-report", action="store_true", help="compile, measure nothing")
    parser.add_argument("--json", type=results_file, help="write the rows to this file")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    cases = [case for case in kernel_cases() if arguments.op in (None, case.op)]
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    facts, failed = machine(device), False
    if arguments.compile_report:
        try:
            rows = compile_rows(arguments.op)
        except BackendError as error:
            parser.error(str(error))
        print_compile_table(rows)
        failed = any(faults(row) for row in rows)
    elif on_gpu:
        limits = measure_ceilings(device, dtype)
        facts |= limits.facts()
        rows = []
        for case in cases:
            rows += measure(case, device, dtype, limits, compiled=arguments.compile)
            if arguments.json:  # what there is, in case that a later one does not end well
                keep_rows(arguments.json, "op_times.py", facts, rows)
            if is_lost(device):
                print(f"the GPU refuses all work after {case.op}", file=sys.stderr)
                break
        print_times(rows, facts)
        failed = is_lost(device) or any(r.get("refused", "").startswith("wrong") for r in rows)
    else:
        rows = floor_rows(cases, dtype)
        print_floors(rows, dtype)
        print("No GPU here: nothing was timed.")
    if arguments.json:
        write_rows(arguments.json, "op_times.py", facts, rows)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
