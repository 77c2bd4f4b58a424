"""Adaptive LayerNorm: LN(x) * (1 + scale) + shift, the norm without parameters of its own.

In NOVA it is the norm of the diffusion MLP, whose scale and shift are made from the encoder's
output and the timestep (DiT, arXiv 2212.09748). Reference, operator and gradient.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from nova_kernels.checks import check_broadcast, check_rows
from nova_kernels.dispatch import Op, define, new_rows, through_operator

OP = Op("scale_shift")
EPS = 1e-6


def scale_shift(
    x: Tensor, scale: Tensor, shift: Tensor, *, eps: float = EPS, backend: str = "auto"
) -> Tensor:
    """LN(x) * (1 + scale) + shift over the last axis.

    Statistics are in float32, or float64 for float64.

    Args:
        x: (..., width), any strides.
        scale, shift: (..., width), of x's shape or broadcast to it; x's dtype.
        eps: added to the variance.
        backend: see `nova_kernels.dispatch`.

    Returns:
        Of x's shape and dtype.

    Raises:
        ValueError: shapes or dtypes that do not fit, or an unknown backend.
        BackendError: the backend cannot run on these tensors.
    """
    check_rows("scale_shift", x)
    check_broadcast("scale_shift", "scale", scale, x)
    check_broadcast("scale_shift", "shift", shift, x)
    chosen = OP.choose(backend, x, scale, shift)
    if chosen == "reference":
        return reference(x, scale, shift, eps)
    if through_operator(x, scale, shift):
        return torch.ops.nova_kernels.scale_shift(x, scale, shift, eps, chosen)
    return _forward(x, scale, shift, eps, chosen)


def reference(x: Tensor, scale: Tensor, shift: Tensor, eps: float = EPS) -> Tensor:
    """The op in plain torch, differentiable; arguments as those of `scale_shift`."""
    exact = torch.promote_types(x.dtype, torch.float32)
    normed = F.layer_norm(x.to(exact), x.shape[-1:], eps=eps)
    return (normed * (1 + scale.to(exact)) + shift.to(exact)).to(x.dtype)


def _forward(x: Tensor, scale: Tensor, shift: Tensor, eps: float, backend: str) -> Tensor:
    return OP.module(backend).forward(x, scale, shift, eps)


def _backward(
    grad: Tensor, x: Tensor, scale: Tensor, eps: float, backend: str
) -> tuple[Tensor, Tensor]:
    return OP.module(backend).backward(grad, x, scale, eps)


define(
    "scale_shift(Tensor x, Tensor scale, Tensor shift, float eps, str backend) -> Tensor",
    _forward,
    lambda x, scale, shift, eps, backend: new_rows(x),
)
define(
    "scale_shift_backward(Tensor grad, Tensor x, Tensor scale, float eps, str backend)"
    " -> (Tensor, Tensor)",
    _backward,
    lambda grad, x, scale, eps, backend: (new_rows(x), new_rows(x)),
)


def _save(ctx, inputs, output) -> None:
    x, scale, shift, ctx.eps, ctx.backend = inputs
    ctx.save_for_backward(x, scale)
    ctx.shift_shape = shift.shape


def _gradients(ctx, grad: Tensor):
    x, scale = ctx.saved_tensors
    grad_x, grad_scale = torch.ops.nova_kernels.scale_shift_backward(
        grad, x, scale, ctx.eps, ctx.backend
    )
    return (
        grad_x,
        grad_scale.sum_to_size(scale.shape),
        grad.sum_to_size(ctx.shift_shape),
        None,
        None,
    )


torch.library.register_autograd("nova_kernels::scale_shift", _gradients, setup_context=_save)
