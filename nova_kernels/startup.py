"""Whether kernels start on a GPU at all: found out by starting one, before "auto" takes any."""

import warnings
from collections.abc import Callable
from functools import cache

import torch
from torch.utils._python_dispatch import _disable_current_modes

from nova_kernels.errors import BackendError, in_a_line
from nova_kernels.out_of_memory import is_out_of_gpu_memory


class StartupWarning(UserWarning):
    """Kernels that would be chosen do not start on a GPU."""


def _start_triton(device: torch.device) -> None:
    """Compile and launch a small kernel, for which Triton needs a C compiler."""
    from nova_kernels.triton_kernels.linear_gelu import plan

    x = torch.zeros(1, dtype=torch.float32, device=device)
    plan(x, x).run()


def _start_cuda(device: torch.device) -> None:
    """Load the extension's code, which may be for other cards or too new for the driver."""
    from nova_kernels.cuda_kernels.denoise import device_limits
    from nova_kernels.cuda_kernels.extension import extension

    limits = device_limits(extension(), device, torch.float16, passes=1)
    if max(limits.clusters.values()) == 0:
        raise BackendError("the GPU makes no cooperative launches")


STARTS: dict[str, Callable[[torch.device], None]] = {"triton": _start_triton, "cuda": _start_cuda}


@cache
def failure_to_start(backend: str, device: torch.device) -> str | None:
    """Why the kernels of a backend do not start on a GPU, which a warning says too; None: they do.

    Raises:
        RuntimeError: the GPU has no memory left, see `is_out_of_gpu_memory`; the next call tries
            again.
    """
    try:
        with _disable_current_modes():  # in FakeTensorMode nothing would start
            STARTS[backend](device)
    except Exception as error:  # whatever compilers and drivers raise
        if is_out_of_gpu_memory(error):
            raise
        reason = in_a_line(error)
        warnings.warn(
            f"kernels of backend {backend!r} do not start on {device}, so plain torch runs instead"
            f": {reason} (python -m nova_kernels tries all of them)",
            StartupWarning,
            stacklevel=2,
        )
        return reason
    return None
