"""What is available, what runs by default, and whether it is right on this machine's GPU."""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from nova_kernels.dispatch import Op, is_interpreting, requested
from nova_kernels.errors import BackendError, in_a_line
from nova_kernels.isolation import Ended, run_apart
from nova_kernels.self_check import TOLERANCES, largest_error, self_checks

PROGRAM = [sys.executable, "-m", "nova_kernels.check_process"]
TIMEOUT_S = 180.0  # for an implementation, whose kernels may have to be compiled
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass
class ImplementationReport:
    """One implementation of one op on one device.

    Attributes:
        op, backend: names.
        obstacle: why it cannot run here; None: it can.
        verified: whether it passed its tests on such hardware, with results in the repository.
        default: whether backend="auto" takes it here, for large tensors.
        errors: largest relative error against the reference in float64, by dtype; empty where
            nothing was checked.
        failure: what went wrong while it was checked, else None.
    """

    op: str
    backend: str
    obstacle: str | None
    verified: bool
    default: bool
    errors: dict[str, float]
    failure: str | None = None

    @property
    def is_right(self) -> bool:
        """Whether nothing that was checked is wrong."""
        return self.failure is None


def report(device: str | None = None, *, check: bool = True) -> list[ImplementationReport]:
    """All implementations of all ops on a device; arguments as those of `each_report`.

    Returns:
        A report for every op and implementation, the reference first.

    Raises:
        BackendError: see `each_report`.
    """
    return list(each_report(device, check=check))


def each_report(device: str | None = None, *, check: bool = True) -> Iterator[ImplementationReport]:
    """What `report` returns, one by one as it is found out.

    Args:
        device: None: the GPU, if there is one, else the CPU.
        check: run every implementation that can run on small inputs, forward and backward, in all
            dtypes, and compare it with its reference. On a GPU that is done by another process
            (`isolation.py`).

    Raises:
        BackendError: NOVA_KERNELS_BACKEND is not a backend.
    """
    requested("auto")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    device = str(torch.empty(0, device=device).device)  # with its number
    ops = {case.op.name: case.op for case in self_checks()}
    entries = [
        _describe(op, backend, device)
        for op in ops.values()
        for backend in ("reference", *op.implementations)
    ]
    checks = _checks([e for e in entries if e.obstacle is None], device) if check else None
    for entry in entries:
        if checks is not None and entry.obstacle is None:
            entry.errors, entry.failure = next(checks)
        yield entry


def check_implementation(op: str, backend: str, device: str) -> tuple[dict[str, float], str | None]:
    """Run an implementation of an op on small inputs.

    Returns:
        `errors` and `failure` of its `ImplementationReport`.
    """
    errors: dict[str, float] = {}
    for case in self_checks():
        if case.op.name != op:
            continue
        for dtype in DTYPES:
            if dtype == torch.bfloat16 and backend == "triton" and is_interpreting():
                continue  # which Triton's interpreter rounds wrongly
            name = str(dtype).removeprefix("torch.")
            try:
                error = largest_error(case, backend, device, dtype)
            except Exception as problem:  # of compilers and drivers; it belongs in the report
                return errors, f"{name}: {in_a_line(problem)}"
            errors[name] = max(error, errors.get(name, 0.0))
            if not error <= TOLERANCES[dtype]:
                return errors, f"{name}: error {error:.1e}, allowed {TOLERANCES[dtype]:.0e}"
    return errors, None


def _describe(op: Op, backend: str, device: str) -> ImplementationReport:
    # Large, without memory: some are not worth their launch for small tensors.
    sample = torch.empty(1, device=device).expand(2**16, 2**10)
    is_reference = backend == "reference"
    return ImplementationReport(
        op=op.name,
        backend=backend,
        obstacle=None if is_reference else op.obstacle(backend, sample),
        verified=is_reference or backend in op.verified_on(sample.device),
        default=_default(op, sample) == backend,
        errors={},
    )


def _default(op: Op, sample: torch.Tensor) -> str | None:
    """What runs without a name; None where that is an error, as the environment may ask for."""
    try:
        return op.choose("auto", sample)
    except BackendError:
        return None


def _checks(
    entries: list[ImplementationReport], device: str
) -> Iterator[tuple[dict[str, float], str | None]]:
    implementations = [(entry.op, entry.backend) for entry in entries]
    if not _is_gpu(device):
        yield from (check_implementation(*names, device) for names in implementations)
        return

    def input_for(left: Sequence[tuple[str, str]]) -> str:
        return json.dumps({"device": device, "implementations": left})

    for _, answer in run_apart(PROGRAM, input_for, implementations, TIMEOUT_S):
        yield ({}, answer.reason) if isinstance(answer, Ended) else answer


def _is_gpu(device: str) -> bool:
    return torch.device(device).type == "cuda"
