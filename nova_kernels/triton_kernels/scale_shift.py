"""LN(x) * (1 + scale) + shift in Triton: a program holds whole rows in registers.

One read of every input and one write; the backward pass computes the statistics again, since it
reads x anyway.
"""

import triton
import triton.language as tl
from torch import Tensor

from nova_kernels.dispatch import new_rows, promoted
from nova_kernels.rows import as_rows
from nova_kernels.triton_kernels.launch import Launch
from nova_kernels.triton_kernels.row_settings import row_launch
from nova_kernels.triton_kernels.standardize import standardize


@triton.jit
def scale_shift_forward_kernel(
    x, scale, shift, out, num_rows, inner, width, x_outer, x_inner, scale_outer, scale_inner,
    shift_outer, shift_inner, eps, ADD_ONE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    column = tl.arange(0, BLOCK_WIDTH)[None, :]
    inside = (row < num_rows) & (column < width)
    o, i = row // inner, row % inner
    values = tl.load(x + o * x_outer + i * x_inner + column, inside, 0.0).to(tl.float32)
    factor = tl.load(scale + o * scale_outer + i * scale_inner + column, inside, 0.0)
    offset = tl.load(shift + o * shift_outer + i * shift_inner + column, inside, 0.0)
    normed, _ = standardize(values, column < width, width, eps)
    factor = factor.to(tl.float32) + 1.0 if ADD_ONE else factor.to(tl.float32)
    result = normed * factor + offset.to(tl.float32)
    tl.store(out + row * width + column, result.to(out.dtype.element_ty), inside)


@triton.jit
def scale_shift_backward_kernel(
    grad, x, scale, grad_x, grad_scale, num_rows, inner, width, grad_outer, grad_inner, x_outer,
    x_inner, scale_outer, scale_inner, eps, ADD_ONE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    column = tl.arange(0, BLOCK_WIDTH)[None, :]
    inside = (row < num_rows) & (column < width)
    o, i = row // inner, row % inner
    g = tl.load(grad + o * grad_outer + i * grad_inner + column, inside, 0.0).to(tl.float32)
    values = tl.load(x + o * x_outer + i * x_inner + column, inside, 0.0).to(tl.float32)
    factor = tl.load(scale + o * scale_outer + i * scale_inner + column, inside, 0.0)
    normed, inverse = standardize(values, column < width, width, eps)
    factor = factor.to(tl.float32) + 1.0 if ADD_ONE else factor.to(tl.float32)
    g_normed = g * factor
    # The gradient of a standardized row has neither a mean nor a part along the row.
    mean = tl.sum(g_normed, axis=1)[:, None] / width
    along = tl.sum(g_normed * normed, axis=1)[:, None] / width
    target = row * width + column
    result = (g_normed - mean - normed * along) * inverse
    tl.store(grad_x + target, result.to(grad_x.dtype.element_ty), inside)
    tl.store(grad_scale + target, (g * normed).to(grad_scale.dtype.element_ty), inside)


def forward(x: Tensor, scale: Tensor, shift: Tensor, eps: float, add_one: bool) -> Tensor:
    """See `nova_kernels.ops.scale_shift`."""
    launch, out = plan_forward(x, scale, shift, eps, add_one)
    launch.run()
    return out


def backward(
    grad: Tensor, x: Tensor, scale: Tensor, eps: float, add_one: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of scale."""
    launch, grad_x, grad_scale = plan_backward(grad, x, scale, eps, add_one)
    launch.run()
    return grad_x, grad_scale


def plan_forward(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, add_one: bool
) -> tuple[Launch, Tensor]:
    """The launch of the forward pass, and the tensor that it fills."""
    out = new_rows(x, promoted(x, scale, shift))
    rows = as_rows(x, scale, shift)
    arguments = {**rows.arguments("x", "scale", "shift"), "out": out, "eps": eps}
    return row_launch(scale_shift_forward_kernel, rows, arguments, {"ADD_ONE": add_one}), out


def plan_backward(
    grad: Tensor, x: Tensor, scale: Tensor, eps: float, add_one: bool
) -> tuple[Launch, Tensor, Tensor]:
    """The launch of the backward pass, and the two tensors that it fills."""
    grad_x = new_rows(x)
    grad_scale = new_rows(x, scale.dtype)
    rows = as_rows(grad, x, scale)
    arguments = {
        **rows.arguments("grad", "x", "scale"),
        "grad_x": grad_x,
        "grad_scale": grad_scale,
        "eps": eps,
    }
    launch = row_launch(scale_shift_backward_kernel, rows, arguments, {"ADD_ONE": add_one})
    return launch, grad_x, grad_scale
