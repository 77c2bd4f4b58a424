"""x + gate * (LN(h) * weight + bias) in Triton: a program holds whole rows in registers.

In the backward pass a program walks down a strip of rows and keeps the gradients of weight and
bias in registers; the strips' sums are added by torch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nova_kernels.dispatch import new_rows
from nova_kernels.rows import as_rows
from nova_kernels.triton_kernels.launch import Launch, ceil_div
from nova_kernels.triton_kernels.row_settings import row_launch, row_setting
from nova_kernels.triton_kernels.standardize import standardize

# Blocks of rows that a program of the backward pass walks down: the sums that it writes are then
# some 2 % of the bytes.
STRIP = 32


@triton.jit
def residual_norm_forward_kernel(
    x, h, weight, bias, gate, out, num_rows, inner, width, x_outer, x_inner, h_outer, h_inner,
    gate_outer, gate_inner, out_outer, out_inner, eps, AFFINE: tl.constexpr, GATED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    column = tl.arange(0, BLOCK_WIDTH)[None, :]
    inside = (row < num_rows) & (column < width)
    o, i = row // inner, row % inner
    values = tl.load(h + o * h_outer + i * h_inner + column, inside, 0.0).to(tl.float32)
    residual = tl.load(x + o * x_outer + i * x_inner + column, inside, 0.0).to(tl.float32)
    branch, _ = standardize(values, column < width, width, eps)
    if AFFINE:
        branch *= tl.load(weight + column, column < width, 0.0).to(tl.float32)
        branch += tl.load(bias + column, column < width, 0.0).to(tl.float32)
    if GATED:
        factor = tl.load(gate + o * gate_outer + i * gate_inner + column, inside, 0.0)
        branch *= factor.to(tl.float32)
    target = out + o * out_outer + i * out_inner + column
    tl.store(target, (residual + branch).to(out.dtype.element_ty), inside)


@triton.jit
def residual_norm_backward_kernel(
    grad, h, weight, bias, gate, grad_h, grad_weight, grad_bias, grad_gate, num_rows, inner, width,
    grad_outer, grad_inner, h_outer, h_inner, gate_outer, gate_inner, eps, AFFINE: tl.constexpr,
    GATED: tl.constexpr, STRIP: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    strip = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_WIDTH)[None, :]
    in_width = column < width
    if AFFINE:
        w = tl.load(weight + column, in_width, 0.0).to(tl.float32)
        b = tl.load(bias + column, in_width, 0.0).to(tl.float32)
    weight_sum = tl.zeros([1, BLOCK_WIDTH], tl.float32)
    bias_sum = tl.zeros([1, BLOCK_WIDTH], tl.float32)
    for step in range(STRIP):
        row = (strip * STRIP + step) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
        inside = (row < num_rows) & in_width
        o, i = row // inner, row % inner
        g = tl.load(grad + o * grad_outer + i * grad_inner + column, inside, 0.0).to(tl.float32)
        values = tl.load(h + o * h_outer + i * h_inner + column, inside, 0.0).to(tl.float32)
        normed, inverse = standardize(values, in_width, width, eps)
        target = row * width + column
        if GATED:
            branch = normed * w + b if AFFINE else normed
            tl.store(grad_gate + target, (g * branch).to(grad_gate.dtype.element_ty), inside)
            factor = tl.load(gate + o * gate_outer + i * gate_inner + column, inside, 0.0)
            g *= factor.to(tl.float32)
        if AFFINE:
            weight_sum += tl.sum(g * normed, axis=0)[None, :]
            bias_sum += tl.sum(g, axis=0)[None, :]
            g *= w
        mean = tl.sum(g, axis=1)[:, None] / width
        along = tl.sum(g * normed, axis=1)[:, None] / width
        result = (g - mean - normed * along) * inverse
        tl.store(grad_h + target, result.to(grad_h.dtype.element_ty), inside)
    if AFFINE:
        tl.store(grad_weight + strip * width + column, weight_sum, in_width)
        tl.store(grad_bias + strip * width + column, bias_sum, in_width)


def forward(
    x: Tensor,
    h: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    eps: float,
    out: Tensor,
) -> None:
    """See `nova_kernels.ops.residual_norm`; the result goes into out, which may be x."""
    launch = plan_forward(x, h, weight, bias, gate, eps, out)
    launch.run()
    written = launch.arguments["out"]
    if written.data_ptr() != out.data_ptr():
        out.copy_(written)


def backward(
    grad: Tensor,
    h: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of h, weight, bias and gate; empty where these are not given."""
    launch, grad_h, sums, grad_gate = plan_backward(grad, h, weight, bias, gate, eps)
    launch.run()
    if weight is None:
        return grad_h, grad.new_empty(0), grad.new_empty(0), grad_gate
    grad_weight, grad_bias = (s.sum(0).to(weight.dtype) for s in sums)
    return grad_h, grad_weight, grad_bias, grad_gate


def plan_forward(
    x: Tensor,
    h: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    eps: float,
    out: Tensor,
) -> Launch:
    """The launch of the forward pass into out."""
    # Without a gate h takes its place in the list of arguments, and is not read there.
    rows = as_rows(x, h, h if gate is None else gate, out)
    arguments = {
        **rows.arguments("x", "h", "gate", "out"),
        "weight": x if weight is None else weight.contiguous(),
        "bias": x if bias is None else bias.contiguous(),
        "eps": eps,
    }
    constants = {"AFFINE": weight is not None, "GATED": gate is not None}
    return row_launch(residual_norm_forward_kernel, rows, arguments, constants)


def plan_backward(
    grad: Tensor,
    h: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    eps: float,
) -> tuple[Launch, Tensor, Tensor, Tensor]:
    """The launch of the backward pass, and what it fills: grad_h, the strips' sums, grad_gate."""
    grad_h = new_rows(h)
    grad_gate = grad.new_empty(0) if gate is None else new_rows(h, gate.dtype)
    rows = as_rows(grad, h, h if gate is None else gate)
    strips = ceil_div(rows.count, STRIP * row_setting(rows.width).block_rows)
    sums = torch.empty(2, strips, rows.width, dtype=torch.float32, device=h.device)
    arguments = {
        **rows.arguments("grad", "h", "gate"),
        "weight": h if weight is None else weight.contiguous(),
        "bias": h if bias is None else bias.contiguous(),
        "grad_h": grad_h,
        "grad_weight": sums[0],
        "grad_bias": sums[1],
        "grad_gate": grad_h if gate is None else grad_gate,
        "eps": eps,
    }
    constants = {"AFFINE": weight is not None, "GATED": gate is not None, "STRIP": STRIP}
    launch = row_launch(residual_norm_backward_kernel, rows, arguments, constants, STRIP)
    return launch, grad_h, sums, grad_gate
