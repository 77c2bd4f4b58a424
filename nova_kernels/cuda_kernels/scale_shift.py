"""LN(x) * (1 + scale) + shift in CUDA C++ (csrc/scale_shift.cuh)."""

from types import ModuleType

from torch import Tensor

from nova_kernels.cuda_kernels.extension import extension
from nova_kernels.cuda_kernels.row_launch import in_one_dtype, launch_rows
from nova_kernels.dispatch import new_rows


def forward(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    add_one: bool,
    module: ModuleType | None = None,
) -> Tensor:
    """See `nova_kernels.ops.scale_shift`.

    Args:
        x, scale, shift: (..., width) of one shape; of several dtypes, copies in the promoted one
            are made.
        module: the extension, or what stands in for it.

    Raises:
        BackendError: there is no extension, or its kernels do not take these tensors.
    """
    module = module or extension()
    x, scale, shift = in_one_dtype("scale_shift", x, scale, shift)
    out = new_rows(x)
    launch_rows(
        module,
        "scale_shift",
        "ScaleShiftArguments",
        {"x": x, "scale": scale, "shift": shift, "out": out},
        {"eps": eps, "scale_offset": float(add_one)},
    )
    return out


def backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    eps: float,
    add_one: bool,
    module: ModuleType | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of scale; arguments and errors as those of `forward`."""
    module = module or extension()
    dtypes = x.dtype, scale.dtype
    grad, x, scale = in_one_dtype("scale_shift", grad, x, scale)
    gradients = {"grad_x": new_rows(x), "grad_scale": new_rows(x)}
    launch_rows(
        module,
        "scale_shift_backward",
        "ScaleShiftBackwardArguments",
        {"grad": grad, "x": x, "scale": scale, **gradients},
        {"eps": eps, "scale_offset": float(add_one)},
    )
    grad_x, grad_scale = (g.to(d) for g, d in zip(gradients.values(), dtypes, strict=True))
    return grad_x, grad_scale
