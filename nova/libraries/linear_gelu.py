"""GELU(x @ weight.T + bias), the first layer of an MLP, by libraries that make GELU on the way.

That is before the product leaves the registers, which the op of the same name does not do.
"""

import torch
from torch import Tensor

from nova_kernels.errors import BackendError

from . import TORCH
from .packages import QUACK, installed_packages

# Neighbours in memory are moved 16 bytes at a time.
MULTIPLE = 8


def quack(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The package quack-kernels: products for Hopper and later, compiled when they first run.

    See `linear_gelu`.
    """
    if x.dtype not in (torch.float16, torch.bfloat16) or not x.dtype == weight.dtype == bias.dtype:
        raise BackendError(
            "quack-kernels takes one dtype, float16 or bfloat16, not "
            f"{x.dtype}, {weight.dtype} and {bias.dtype}"
        )
    if any(size % MULTIPLE for size in weight.shape):
        raise BackendError(
            f"quack-kernels takes widths that are multiples of {MULTIPLE}, not "
            f"{weight.shape[1]} to {weight.shape[0]}"
        )
    # Imported late: it imports a compiler, which takes seconds.
    from quack.gemm_interface import gemm_act

    rows = x.reshape(-1, x.shape[-1])
    with torch.cuda.device_of(x):
        # Its own tuning would measure every number of rows by itself.
        options = {"activation": "gelu_erf", "store_preact": False, "tuned": False}
        _, out = gemm_act(rows, weight.t(), bias=bias.contiguous(), **options)
    return out.view(*x.shape[:-1], out.shape[-1])


LIBRARIES = {QUACK: quack}


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, library: str) -> Tensor:
    """GELU(x @ weight.T + bias) over the last axis, exact (erf) form, without a gradient.

    The product is not rounded before GELU.

    Args:
        x: (..., inputs), any strides.
        weight: (outputs, inputs).
        bias: (outputs,).
        library: one of `LIBRARIES`.

    Returns:
        (..., outputs).

    Raises:
        BackendError: the library cannot compute it for this dtype or shape.
    """
    return LIBRARIES[library](x, weight, bias)


def installed_libraries(device: torch.device) -> tuple[str, ...]:
    """Those that there are for a device, behind `TORCH`, the op of the same name."""
    there = installed_packages() if device.type == "cuda" else {}
    return (TORCH, *(name for name in LIBRARIES if name in there))
