"""Devices: is the one asked for there, and what to say when its memory is not enough."""

import contextlib
from collections.abc import Iterator

import torch

from .errors import DeviceError


def check_device(device: str | torch.device | int) -> torch.device:
    """The device, if torch can use it.

    Raises:
        DeviceError: not a device's name, or absent.
    """
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise DeviceError(f"{device!r} is no device; use cpu, cuda, cuda:1 or mps") from error
    if device.type not in ("cpu", "cuda", "mps"):
        raise DeviceError(f"{device} is not supported; use cpu, cuda, cuda:1 or mps")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            built = torch.version.cuda or torch.version.hip
            reason = "no GPU is visible" if built else "this torch is built without CUDA"
            raise DeviceError(
                f"CUDA was asked for, but {reason}; use --device cpu, see nova doctor"
            )
        if device.index is not None and device.index >= torch.cuda.device_count():
            count = torch.cuda.device_count()
            raise DeviceError(f"there is no {device}: {count} GPUs are visible, from cuda:0 on")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise DeviceError("MPS was asked for, but it is not available; use --device cpu")
    return device


def default_device() -> torch.device:
    """The first GPU, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextlib.contextmanager
def out_of_memory(doing: str) -> Iterator[None]:
    """Turn torch's out-of-memory errors inside into a `DeviceError` that says what to do."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        free, total = torch.cuda.mem_get_info()
        raise DeviceError(
            f"out of GPU memory while {doing} "
            f"({free / 2**30:.1f} of {total / 2**30:.1f} GiB free). Use "
            "fewer samples at a time, torch_dtype=torch.bfloat16, "
            "enable_model_cpu_offload(), or vae.module.enable_tiling()"
        ) from error
    except RuntimeError as error:
        if "DefaultCPUAllocator" not in str(error):  # who says so on a CPU
            raise
        raise DeviceError(
            f"out of memory while {doing}. Use fewer samples at a time, or "
            "vae.module.enable_tiling()"
        ) from error
