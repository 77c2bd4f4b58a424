"""The post-norm residual: x + gate * (LN(h) * weight + bias), gate and affine part optional.

Every block of NOVA's encoders adds its branches this way, and with a gate the blocks of its
diffusion MLP do (arXiv 2412.14169). Reference, operator and gradient.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from nova_kernels.checks import check_writable, common_shape
from nova_kernels.dispatch import (
    Op,
    define,
    define_gradient,
    define_no_gradient,
    new_rows,
    promoted,
    through_operator,
    written,
)
from nova_kernels.rows import MAX_WIDTH

OP = Op(
    "residual_norm",
    implementations=("triton", "cuda"),
    verified=frozenset({"triton", "cuda"}),
    max_width=MAX_WIDTH,
    least_values=2**25,
)
EPS = 1e-5


def residual_norm(
    x: Tensor,
    h: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    gate: Tensor | None = None,
    eps: float = EPS,
    inplace: bool = False,
    backend: str = "auto",
) -> Tensor:
    """x + gate * (LN(h) * weight + bias) over the last axis.

    Kernels compute in float32.

    Args:
        x, h, gate: (..., width), any strides, broadcast to one shape; h is normed.
        weight, bias: (width,), of the norm; both or none.
        eps: added to the variance.
        inplace: write the result into x (which then has the common shape; without gradients).
        backend: see `nova_kernels.dispatch`.

    Returns:
        Of the common shape, several dtypes promoted as torch does; x itself if `inplace`.

    Raises:
        ValueError: shapes that do not fit, one of weight and bias without the other,
            `inplace` where gradients are needed, or an unknown backend.
        BackendError: the backend cannot run on these tensors.
    """
    given = [t for t in (x, h, weight, bias, gate) if t is not None]
    shape = _check(x, h, weight, bias, gate)
    chosen = OP.choose(backend, *given)
    if inplace:
        if torch.is_grad_enabled() and any(t.requires_grad for t in given):
            raise ValueError("residual_norm: inplace=True destroys what gradients are made of")
        if x.shape != shape:
            raise ValueError(
                f"residual_norm: {tuple(shape)} does not fit in place of {tuple(x.shape)}"
            )
        check_writable("residual_norm", "x", x)
        if chosen == "reference":
            return x.copy_(reference(x, h, weight, bias, gate, eps))
        h, gate = (None if t is None else t.expand(shape) for t in (h, gate))
        if through_operator(*given):
            into_x = torch.ops.nova_kernels.residual_norm_
        else:
            into_x = _forward_into_x
            # Rows are written while others are still read.
            h, weight, bias, gate = (_apart_from(x, t) for t in (h, weight, bias, gate))
        into_x(x, h, weight, bias, gate, eps, chosen)
        return x
    if chosen == "reference":
        return reference(x, h, weight, bias, gate, eps)
    x, h, gate = (None if t is None else t.expand(shape) for t in (x, h, gate))
    if through_operator(*given):
        return torch.ops.nova_kernels.residual_norm(x, h, weight, bias, gate, eps, chosen)
    return _forward(x, h, weight, bias, gate, eps, chosen)


def reference(
    x: Tensor,
    h: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    eps: float = EPS,
) -> Tensor:
    """The op in plain torch, differentiable; arguments as those of `residual_norm`."""
    dtype = promoted(h, weight, bias)
    # torch's kernel for GPUs takes one dtype, that for CPUs would take several.
    given = (None if t is None else t.to(dtype) for t in (weight, bias))
    branch = F.layer_norm(h.to(dtype), h.shape[-1:], *given, eps).to(h.dtype)
    return x + branch if gate is None else torch.addcmul(x, gate, branch)


def _check(
    x: Tensor, h: Tensor, weight: Tensor | None, bias: Tensor | None, gate: Tensor | None
) -> torch.Size:
    rows = {"x": x, "h": h} if gate is None else {"x": x, "h": h, "gate": gate}
    shape = common_shape("residual_norm", **rows)
    if (weight is None) != (bias is None):
        raise ValueError("residual_norm: give weight and bias, or neither")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.shape != x.shape[-1:]:
            raise ValueError(
                f"residual_norm: {name} must be ({x.shape[-1]},), got {tuple(tensor.shape)}"
            )
    return shape


def _forward(
    x: Tensor,
    h: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    eps: float,
    backend: str,
) -> Tensor:
    out = new_rows(x, promoted(x, h, gate))
    OP.module(backend).forward(x, h, weight, bias, gate, eps, out)
    return out


def _forward_into_x(
    x: Tensor,
    h: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    eps: float,
    backend: str,
) -> None:
    OP.module(backend).forward(x, h, weight, bias, gate, eps, x)
    written(x)


def _apart_from(x: Tensor, other: Tensor | None) -> Tensor | None:
    """`other`, copied if a part of it lies where another part of x is."""
    if other is None or (other.data_ptr(), other.stride()) == (x.data_ptr(), x.stride()):
        return other
    (first, last), (start, stop) = _addresses(x), _addresses(other)
    return other.clone() if start < last and first < stop else other


def _addresses(tensor: Tensor) -> tuple[int, int]:
    """Where a tensor's first element is, and where its last one ends."""
    strides = zip(tensor.shape, tensor.stride(), strict=True)
    values = 1 + sum((size - 1) * stride for size, stride in strides)
    return tensor.data_ptr(), tensor.data_ptr() + values * tensor.element_size()


def _backward(
    grad: Tensor,
    h: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return OP.module(backend).backward(grad, h, weight, bias, gate, eps)


def _fake_backward(grad, h, weight, bias, gate, eps, backend):
    none = grad.new_empty(0)
    affine = none if weight is None else torch.empty_like(weight)
    grad_gate = none.clone() if gate is None else new_rows(h, gate.dtype)
    return new_rows(h), affine, affine.clone(), grad_gate


_ARGUMENTS = "Tensor? weight, Tensor? bias, Tensor? gate, float eps, str backend"
define(
    f"residual_norm(Tensor x, Tensor h, {_ARGUMENTS}) -> Tensor",
    _forward,
    lambda x, h, weight, bias, gate, *_: new_rows(x, promoted(x, h, gate)),
)
define(
    f"residual_norm_(Tensor(a!) x, Tensor h, {_ARGUMENTS}) -> ()",
    _forward_into_x,
    lambda x, h, weight, bias, gate, eps, backend: None,
)
define(
    f"residual_norm_backward(Tensor grad, Tensor h, {_ARGUMENTS})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)


def _save(ctx, inputs, output) -> None:
    x, h, weight, bias, gate, ctx.eps, ctx.backend = inputs
    ctx.x_dtype = x.dtype
    ctx.save_for_backward(h, weight, bias, gate)


def _gradients(ctx, grad: Tensor):
    h, weight, bias, gate = ctx.saved_tensors
    grad_h, grad_weight, grad_bias, grad_gate = torch.ops.nova_kernels.residual_norm_backward(
        grad, h, weight, bias, gate, ctx.eps, ctx.backend
    )
    affine = (None, None) if weight is None else (grad_weight, grad_bias)
    grad_gate = None if gate is None else grad_gate
    return grad.to(ctx.x_dtype), grad_h, *affine, grad_gate, None, None


define_gradient("residual_norm", _gradients, _save)
define_no_gradient("residual_norm_backward")
