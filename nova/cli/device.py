"""Device and precision of the command line, where the user names none."""

import torch

from ..devices import check_device, default_device


def choose_device(name: str | None) -> torch.device:
    """The device of that name; without a name the GPU, if there is one.

    Raises:
        DeviceError: no such device.
    """
    return default_device() if name is None else check_device(name)


def choose_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The dtype of that name; without a name bfloat16 on CUDA GPUs, float32 elsewhere."""
    if name is not None:
        return getattr(torch, name)
    return torch.bfloat16 if device.type == "cuda" else torch.float32
