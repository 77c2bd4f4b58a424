"""NOVA's cross-frame layer: frame 0's features, scaled and shifted by what another frame says.

    scale, shift = split(up @ (down @ silu(current)) + bias)
    out = first * (1 + scale) + shift

arXiv 2412.14169 calls it scaling and shift layer; its projection has low rank. Reference, operator
and gradient.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from nova_kernels.autocast import autocast_dtype
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

OP = Op("frame_scale_shift", verified=frozenset({"triton"}), least_values=2**24)
MAX_RANK = 128  # of the fused kernels, which keep `down @ silu(current)` in registers


def frame_scale_shift(
    first: Tensor,
    current: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor,
    *,
    backend: str = "auto",
) -> Tensor:
    """first * (1 + scale(current)) + shift(current) over the last axis.

    Under autocast the projection is computed in autocast's dtype, as torch's linear layers are.

    Args:
        first: (..., width) features of frame 0,
        current: (..., width) features of other frames; broadcast to one shape.
        down: (rank, width) and
        up: (2 * width, rank): the projection; the first half of its output is the scale.
        bias: (2 * width,).
        backend: see `nova_kernels.dispatch`. Other than the reference, ranks up to 128.

    Returns:
        Of the common shape; several dtypes are promoted as torch does.

    Raises:
        ValueError: shapes that do not fit, or an unknown backend.
        BackendError: the backend cannot run on these tensors, with this rank, or on several dtypes.
    """
    tensors = (first, current, down, up, bias)
    shape = common_shape("frame_scale_shift", first=first, current=current)
    _check(*tensors)
    if backend == "auto" and down.shape[0] > MAX_RANK:
        backend = "reference"
    chosen = OP.choose(backend, *tensors)
    if chosen == "reference":
        return reference(*tensors)
    projecting = (current.expand(shape), down, up, bias)
    dtype = autocast_dtype(current.device)
    if dtype is not None:
        projecting = tuple(tensor.to(dtype) for tensor in projecting)
    tensors = (first.expand(shape), *projecting)
    if through_operator(*tensors):
        return torch.ops.nova_kernels.frame_scale_shift(*tensors, chosen)
    return _forward(*tensors, chosen)


def reference(first: Tensor, current: Tensor, down: Tensor, up: Tensor, bias: Tensor) -> Tensor:
    """The op in plain torch, differentiable; arguments as those of `frame_scale_shift`."""
    projected = F.linear(F.linear(F.silu(current), down), up, bias)
    scale, shift = projected.chunk(2, dim=-1)
    return torch.addcmul(shift, first, 1 + scale)


def _check(first: Tensor, current: Tensor, down: Tensor, up: Tensor, bias: Tensor) -> None:
    width = current.shape[-1]
    rank = down.shape[0] if down.dim() == 2 else 0
    if rank < 1 or down.shape[1] != width or up.shape != (2 * width, rank):
        raise ValueError(
            f"frame_scale_shift: down must be (rank, {width}) and up ({2 * width}, rank), got "
            f"{tuple(down.shape)} and {tuple(up.shape)}"
        )
    if bias.shape != (2 * width,):
        raise ValueError(f"frame_scale_shift: bias must be ({2 * width},), got {tuple(bias.shape)}")


def _forward(
    first: Tensor, current: Tensor, down: Tensor, up: Tensor, bias: Tensor, backend: str
) -> Tensor:
    return OP.module(backend).forward(first, current, down, up, bias)


def _backward(
    grad: Tensor,
    first: Tensor,
    current: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return OP.module(backend).backward(grad, first, current, down, up, bias)


_ARGUMENTS = "Tensor first, Tensor current, Tensor down, Tensor up, Tensor bias, str backend"
define(
    f"frame_scale_shift({_ARGUMENTS}) -> Tensor",
    _forward,
    lambda first, current, *_: new_rows(current, promoted(first, current)),
)
define(
    f"frame_scale_shift_backward(Tensor grad, {_ARGUMENTS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    lambda grad, first, current, *weights_and_backend: (
        new_rows(first),
        new_rows(current),
        *(torch.empty_like(w) for w in weights_and_backend[:-1]),
    ),
)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, grad: Tensor):
    backward = torch.ops.nova_kernels.frame_scale_shift_backward
    return *backward(grad, *ctx.saved_tensors, ctx.backend), None


define_gradient("frame_scale_shift", _gradients, _save)
define_no_gradient("frame_scale_shift_backward")
