"""What is available, what runs by default, and whether it is right on this machine's GPU."""

from dataclasses import dataclass

import torch

from nova_kernels.self_check import TOLERANCES, SelfCheck, largest_error, self_checks

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass
class ImplementationReport:
    """One implementation of one op on one device.

    Attributes:
        op, backend: names.
        obstacle: why it cannot run here; None: it can.
        verified: whether it passed the GPU tests on hardware, with results in the repository.
        default: whether backend="auto" takes it here.
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
    """All implementations of all ops on a device.

    Args:
        device: None: the GPU, if there is one, else the CPU.
        check: run every implementation that can run on small inputs, forward and backward, in all
            dtypes, and compare it with its reference.

    Returns:
        A report for every op and implementation, the reference first.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    reports: dict[tuple[str, str], ImplementationReport] = {}
    for case in self_checks():
        for backend in ("reference", *case.op.implementations):
            key = case.op.name, backend
            if key not in reports:
                reports[key] = _describe(case, backend, device)
            if check and reports[key].obstacle is None and reports[key].is_right:
                _check(reports[key], case, device)
    return list(reports.values())


def _describe(case: SelfCheck, backend: str, device: str) -> ImplementationReport:
    sample = torch.empty(0, device=device)
    is_reference = backend == "reference"
    return ImplementationReport(
        op=case.op.name,
        backend=backend,
        obstacle=None if is_reference else case.op.obstacle(backend, sample),
        verified=is_reference or backend in case.op.verified,
        default=case.op.choose("auto", sample) == backend,
        errors={},
    )


def _check(entry: ImplementationReport, case: SelfCheck, device: str) -> None:
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        try:
            error = largest_error(case, entry.backend, device, dtype)
        except Exception as problem:  # whatever a compiler or driver raises belongs in the report
            entry.failure = f"{name}: {type(problem).__name__}: {problem}"
            return
        entry.errors[name] = max(error, entry.errors.get(name, 0.0))
        if not error <= TOLERANCES[dtype]:
            entry.failure = f"{name}: error {error:.1e}, allowed {TOLERANCES[dtype]:.0e}"
            return
