"""GELU(x @ weight.T + bias), exact (erf) form: the first layer of a transformer's MLP.

The product is torch's in every implementation: no kernel of ours was as fast, even with GELU made
before the product leaves registers (docs/kernels.md). What a kernel does better is GELU itself,
which torch computes slower than memory could move its values. Reference, operator and gradient.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from nova_kernels.autocast import autocast_dtype
from nova_kernels.dispatch import (
    Op,
    define,
    define_gradient,
    define_no_gradient,
    through_operator,
)

OP = Op("linear_gelu", verified=frozenset({"triton"}), least_values=2**25)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, *, backend: str = "auto") -> Tensor:
    """GELU(x @ weight.T + bias) over the last axis.

    The product is torch's, rounded to the inputs' dtype; of that the kernel makes GELU in float32,
    in place, and rounds again. Under autocast it computes in autocast's dtype, as torch's linear
    layer does.

    Args:
        x: (..., inputs), any strides.
        weight: (outputs, inputs), any strides.
        bias: (outputs,).
        backend: see `nova_kernels.dispatch`.

    Returns:
        (..., outputs), in the inputs' dtype.

    Raises:
        ValueError: shapes that do not fit, or an unknown backend.
        BackendError: the backend cannot run on these tensors, or on several dtypes.
    """
    _check(x, weight, bias)
    tensors = (x, weight, bias)
    chosen = OP.choose(backend, *tensors)
    if chosen == "reference":
        return reference(*tensors)
    dtype = autocast_dtype(x.device)
    if dtype is not None:
        tensors = tuple(tensor.to(dtype) for tensor in tensors)
    if through_operator(*tensors):
        # Gradients are made of what GELU is applied to.
        keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        return torch.ops.nova_kernels.linear_gelu(*tensors, keep, chosen)[0]
    return _forward(*tensors, False, chosen)[0]


def reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The op in plain torch, differentiable; arguments as those of `linear_gelu`."""
    return F.gelu(F.linear(x, weight, bias))


def _check(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    if x.dim() < 1 or weight.dim() != 2 or weight.shape[1] != x.shape[-1] or 0 in weight.shape:
        raise ValueError(
            "linear_gelu: x must be (..., inputs) and weight (outputs, inputs), got "
            f"{tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"linear_gelu: bias must be ({weight.shape[0]},), got {tuple(bias.shape)}")


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor, keep_hidden: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """The result, and what GELU was applied to (empty unless `keep_hidden`)."""
    return OP.module(backend).forward(x, weight, bias, keep_hidden)


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, hidden: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    # Plain matrix products, which libraries do best.
    grad = torch.ops.aten.gelu_backward(grad, hidden)
    rows, inputs = (t.reshape(-1, t.shape[-1]) for t in (grad, x))
    return grad @ weight, rows.t() @ inputs, rows.sum(0)


def _fake(x, weight, bias, keep_hidden, backend):
    out = x.new_empty(*x.shape[:-1], weight.shape[0])
    return out, torch.empty_like(out) if keep_hidden else out.new_empty(0)


define(
    "linear_gelu(Tensor x, Tensor weight, Tensor bias, bool keep_hidden, str backend)"
    " -> (Tensor, Tensor)",
    _forward,
    _fake,
)
# An operator of its own, since a second derivative by torch would take `hidden` for a constant.
define(
    "linear_gelu_backward(Tensor grad, Tensor x, Tensor weight, Tensor hidden)"
    " -> (Tensor, Tensor, Tensor)",
    _backward,
    lambda grad, x, weight, hidden: (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        torch.empty_like(weight, memory_format=torch.contiguous_format),
        weight.new_empty(weight.shape[0]),
    ),
)


def _save(ctx, inputs, output) -> None:
    x, weight, bias, keep_hidden, _ = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])
    if not keep_hidden:
        raise RuntimeError(
            "linear_gelu: call the operator with keep_hidden where gradients are due"
        )


def _gradients(ctx, grad: Tensor, _):
    gradients = torch.ops.nova_kernels.linear_gelu_backward(grad, *ctx.saved_tensors)
    return *gradients, None, None


define_gradient("linear_gelu", _gradients, _save)
define_no_gradient("linear_gelu_backward")
