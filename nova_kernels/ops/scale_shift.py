"""Adaptive LayerNorm: LN(x) * (1 + scale) + shift, the norm without parameters of its own.

In NOVA it is the norm of the diffusion MLP, whose scale and shift are made from the encoder's
output and the timestep (DiT, arXiv 2212.09748). Reference, operator and gradient.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from nova_kernels.checks import common_shape
from nova_kernels.dispatch import (
    Op,
    define,
    define_gradient,
    define_no_gradient,
    new_rows,
    promoted,
    through_operator,
)
from nova_kernels.rows import MAX_WIDTH

OP = Op("scale_shift", implementations=("triton", "cuda"), max_width=MAX_WIDTH)
EPS = 1e-6


def scale_shift(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    eps: float = EPS,
    add_one: bool = True,
    backend: str = "auto",
) -> Tensor:
    """LN(x) * (1 + scale) + shift over the last axis.

    Kernels compute in float32.

    Args:
        x, scale, shift: (..., width), any strides, broadcast to one shape.
        eps: added to the variance.
        add_one: False: scale holds 1 + scale already.
        backend: see `nova_kernels.dispatch`.

    Returns:
        Of the common shape; several dtypes are promoted as torch does.

    Raises:
        ValueError: shapes that do not fit, or an unknown backend.
        BackendError: the backend cannot run on these tensors.
    """
    shape = common_shape("scale_shift", x=x, scale=scale, shift=shift)
    chosen = OP.choose(backend, x, scale, shift)
    if chosen == "reference":
        return reference(x, scale, shift, eps, add_one)
    x, scale, shift = (tensor.expand(shape) for tensor in (x, scale, shift))
    if through_operator(x, scale, shift):
        return torch.ops.nova_kernels.scale_shift(x, scale, shift, eps, add_one, chosen)
    return _forward(x, scale, shift, eps, add_one, chosen)


def reference(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float = EPS, add_one: bool = True
) -> Tensor:
    """The op in plain torch, differentiable; arguments as those of `scale_shift`."""
    normed = F.layer_norm(x, x.shape[-1:], eps=eps)
    return torch.addcmul(shift, normed, 1 + scale if add_one else scale)


def _forward(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, add_one: bool, backend: str
) -> Tensor:
    return OP.module(backend).forward(x, scale, shift, eps, add_one)


def _backward(
    grad: Tensor, x: Tensor, scale: Tensor, eps: float, add_one: bool, backend: str
) -> tuple[Tensor, Tensor]:
    return OP.module(backend).backward(grad, x, scale, eps, add_one)


define(
    "scale_shift(Tensor x, Tensor scale, Tensor shift, float eps, bool add_one, str backend)"
    " -> Tensor",
    _forward,
    lambda x, scale, shift, *_: new_rows(x, promoted(x, scale, shift)),
)
define(
    "scale_shift_backward(Tensor grad, Tensor x, Tensor scale, float eps, bool add_one,"
    " str backend)"
    " -> (Tensor, Tensor)",
    _backward,
    lambda grad, x, scale, *_: (new_rows(x), new_rows(x, scale.dtype)),
)


def _save(ctx, inputs, output) -> None:
    x, scale, shift, *ctx.numbers = inputs
    ctx.save_for_backward(x, scale)
    ctx.shift_dtype = shift.dtype


def _gradients(ctx, grad: Tensor):
    x, scale = ctx.saved_tensors
    grad_x, grad_scale = torch.ops.nova_kernels.scale_shift_backward(grad, x, scale, *ctx.numbers)
    return grad_x, grad_scale, grad.to(ctx.shift_dtype), None, None, None


define_gradient("scale_shift", _gradients, _save)
define_no_gradient("scale_shift_backward")
