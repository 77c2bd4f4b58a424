"""NOVA's cross-frame layer: frame 0's features, scaled and shifted by what another frame says.

    scale, shift = split(up @ (down @ silu(current)) + bias)
    out = first * (1 + scale) + shift

arXiv 2412.14169 calls it scaling and shift layer; its projection has low rank. Reference, operator
and gradient.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from nova_kernels.checks import check_broadcast, check_rows
from nova_kernels.dispatch import Op, define, new_rows, through_operator

OP = Op("frame_scale_shift")
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

    Args:
        first: (..., width) features of frame 0, broadcast to current's shape.
        current: (..., width) features of other frames.
        down: (rank, width) and
        up: (2 * width, rank): the projection; the first half of its output is the scale.
        bias: (2 * width,).
        backend: see `nova_kernels.dispatch`. Other than the reference, ranks up to 128.

    Returns:
        Of current's shape and dtype.

    Raises:
        ValueError: shapes or dtypes that do not fit, or an unknown backend.
        BackendError: the backend cannot run on these tensors, or not with this rank.
    """
    tensors = (first, current, down, up, bias)
    _check(*tensors)
    if backend == "auto" and down.shape[0] > MAX_RANK:
        backend = "reference"
    chosen = OP.choose(backend, *tensors)
    if chosen == "reference":
        return reference(*tensors)
    if through_operator(*tensors):
        return torch.ops.nova_kernels.frame_scale_shift(*tensors, chosen)
    return _forward(*tensors, chosen)


def reference(first: Tensor, current: Tensor, down: Tensor, up: Tensor, bias: Tensor) -> Tensor:
    """The op in plain torch, differentiable; arguments as those of `frame_scale_shift`."""
    exact = torch.promote_types(current.dtype, torch.float32)
    hidden = F.silu(current.to(exact)) @ down.to(exact).T
    scale, shift = (hidden @ up.to(exact).T + bias.to(exact)).chunk(2, dim=-1)
    return (first.to(exact) * (1 + scale) + shift).to(current.dtype)


def _check(first: Tensor, current: Tensor, down: Tensor, up: Tensor, bias: Tensor) -> None:
    check_rows("frame_scale_shift", current)
    width = current.shape[-1]
    rank = down.shape[0] if down.dim() == 2 else 0
    if rank < 1 or down.shape[1] != width or up.shape != (2 * width, rank):
        raise ValueError(
            f"frame_scale_shift: down must be (rank, {width}) and up ({2 * width}, rank), got "
            f"{tuple(down.shape)} and {tuple(up.shape)}"
        )
    if bias.shape != (2 * width,):
        raise ValueError(f"frame_scale_shift: bias must be ({2 * width},), got {tuple(bias.shape)}")
    check_broadcast("frame_scale_shift", "first", first, current, "current")
    for name, tensor in (("down", down), ("up", up), ("bias", bias)):
        if tensor.dtype != current.dtype:
            raise ValueError(
                f"frame_scale_shift: {name} has dtype {tensor.dtype}, current has {current.dtype}"
            )


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
    lambda first, current, down, up, bias, backend: new_rows(current),
)
define(
    f"frame_scale_shift_backward(Tensor grad, {_ARGUMENTS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    lambda grad, first, current, *weights_and_backend: (
        new_rows(current),
        new_rows(current),
        *(torch.empty_like(w) for w in weights_and_backend[:-1]),
    ),
)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, grad: Tensor):
    first = ctx.saved_tensors[0]
    backward = torch.ops.nova_kernels.frame_scale_shift_backward
    grad_first, *others = backward(grad, *ctx.saved_tensors, ctx.backend)
    return grad_first.sum_to_size(first.shape), *others, None


torch.library.register_autograd("nova_kernels::frame_scale_shift", _gradients, setup_context=_save)
