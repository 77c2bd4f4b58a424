"""Inference beside torch.autocast: in the dtype of weights, which is what kernels read."""

from contextlib import AbstractContextManager, nullcontext

import torch

# Asked once: torch.compile cannot trace the question in torch 2.11.
_HAVE_AUTOCAST = {name for name in ("cpu", "cuda", "mps") if torch.amp.is_autocast_available(name)}


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that torch.autocast has for a device here; None where it is off."""
    kind = device.type
    if kind in _HAVE_AUTOCAST and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Torch's ops take their inputs' dtypes inside, whatever torch.autocast says outside."""
    if autocast_dtype(device) is None:
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
