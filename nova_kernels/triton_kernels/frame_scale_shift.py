"""The cross-frame layer in Triton: a program has some rows, and their low-rank features on chip.

The backward kernel leaves the three gradients of weights, which are plain matrix products, to
torch; it hands over what they are made of.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nova_kernels.dispatch import new_rows, promoted
from nova_kernels.errors import BackendError
from nova_kernels.ops.frame_scale_shift import MAX_RANK
from nova_kernels.rows import as_rows
from nova_kernels.triton_kernels.launch import Launch, ceil_div

HALF = (torch.float16, torch.bfloat16)
# Rows and columns at a time, and warps, for low ranks and for high ones. What fits registers on
# both architectures; float32 has no tensor cores that keep its precision.
HALF_SETTINGS = (32, 64, 8), (32, 32, 4)
EXACT_SETTINGS = (16, 16, 4), (16, 16, 8)
LOW_RANK = 32  # the highest


@triton.jit
def _low_rank(current_rows, down, rows_in, rank, WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr,
              BLOCK_COLUMNS: tl.constexpr, BLOCK_RANK: tl.constexpr):  # fmt: skip
    """silu(current) @ down.T of some rows, float32 (BLOCK_ROWS, BLOCK_RANK)."""
    r = tl.arange(0, BLOCK_RANK)[None, :]
    hidden = tl.zeros([BLOCK_ROWS, BLOCK_RANK], tl.float32)
    for start in range(0, WIDTH, BLOCK_COLUMNS):
        column = start + tl.arange(0, BLOCK_COLUMNS)
        inside = rows_in & (column[None, :] < WIDTH)
        c = tl.load(current_rows + column[None, :], inside, 0.0).to(tl.float32)
        active = (c * tl.sigmoid(c)).to(down.dtype.element_ty)
        in_weights = (column[:, None] < WIDTH) & (r < rank)
        weights = tl.load(down + r * WIDTH + column[:, None], in_weights, 0.0)
        hidden = tl.dot(active, weights, hidden, input_precision="ieee")
    return hidden


@triton.jit
def frame_scale_shift_forward_kernel(
    first, current, down, up, bias, out, num_rows, inner, width, rank, first_outer, first_inner,
    current_outer, current_inner, WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr, BLOCK_RANK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    rows_in = row < num_rows
    o, i = row // inner, row % inner
    current_rows = current + o * current_outer + i * current_inner
    hidden = _low_rank(
        current_rows, down, rows_in, rank, WIDTH, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_RANK
    ).to(up.dtype.element_ty)
    r = tl.arange(0, BLOCK_RANK)[:, None]
    for start in range(0, WIDTH, BLOCK_COLUMNS):
        column = start + tl.arange(0, BLOCK_COLUMNS)[None, :]
        columns_in = column < WIDTH
        in_weights = columns_in & (r < rank)
        to_scale = tl.load(up + column * rank + r, in_weights, 0.0)
        to_shift = tl.load(up + (WIDTH + column) * rank + r, in_weights, 0.0)
        scale = tl.dot(hidden, to_scale, input_precision="ieee")
        shift = tl.dot(hidden, to_shift, input_precision="ieee")
        scale += tl.load(bias + column, columns_in, 0.0).to(tl.float32)
        shift += tl.load(bias + WIDTH + column, columns_in, 0.0).to(tl.float32)
        inside = rows_in & columns_in
        f = tl.load(first + o * first_outer + i * first_inner + column, inside, 0.0)
        result = f.to(tl.float32) * (1.0 + scale) + shift
        tl.store(out + row * WIDTH + column, result.to(out.dtype.element_ty), inside)


@triton.jit
def frame_scale_shift_backward_kernel(
    grad, first, current, down, up, bias, grad_first, grad_current, hidden_out, grad_hidden_out,
    num_rows, inner, width, rank, grad_outer, grad_inner, first_outer, first_inner, current_outer,
    current_inner, WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    rows_in = row < num_rows
    o, i = row // inner, row % inner
    current_rows = current + o * current_outer + i * current_inner
    exact = _low_rank(
        current_rows, down, rows_in, rank, WIDTH, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_RANK
    )
    hidden = exact.to(up.dtype.element_ty)
    r = tl.arange(0, BLOCK_RANK)
    grad_hidden = tl.zeros([BLOCK_ROWS, BLOCK_RANK], tl.float32)
    for start in range(0, WIDTH, BLOCK_COLUMNS):
        column = start + tl.arange(0, BLOCK_COLUMNS)
        columns_in = column[None, :] < WIDTH
        in_weights = (column[:, None] < WIDTH) & (r[None, :] < rank)
        # (columns, rank)
        to_scale = tl.load(up + column[:, None] * rank + r[None, :], in_weights, 0.0)
        to_shift = tl.load(up + (WIDTH + column[:, None]) * rank + r[None, :], in_weights, 0.0)
        scale = tl.dot(hidden, tl.trans(to_scale), input_precision="ieee")
        scale += tl.load(bias + column[None, :], columns_in, 0.0).to(tl.float32)
        inside = rows_in & columns_in
        at = o * grad_outer + i * grad_inner + column[None, :]
        g = tl.load(grad + at, inside, 0.0).to(tl.float32)
        at = o * first_outer + i * first_inner + column[None, :]
        f = tl.load(first + at, inside, 0.0).to(tl.float32)
        target = grad_first + row * WIDTH + column[None, :]
        tl.store(target, (g * (1.0 + scale)).to(grad_first.dtype.element_ty), inside)
        grad_scale = (g * f).to(up.dtype.element_ty)
        grad_shift = g.to(up.dtype.element_ty)
        grad_hidden = tl.dot(grad_scale, to_scale, grad_hidden, input_precision="ieee")
        grad_hidden = tl.dot(grad_shift, to_shift, grad_hidden, input_precision="ieee")
    stored = rows_in & (r[None, :] < rank)
    tl.store(hidden_out + row * rank + r[None, :], hidden, stored)
    rounded = grad_hidden.to(down.dtype.element_ty)
    tl.store(grad_hidden_out + row * rank + r[None, :], rounded, stored)
    for start in range(0, WIDTH, BLOCK_COLUMNS):
        column = start + tl.arange(0, BLOCK_COLUMNS)[None, :]
        in_weights = (column < WIDTH) & (r[:, None] < rank)
        weights = tl.load(down + r[:, None] * WIDTH + column, in_weights, 0.0)
        grad_active = tl.dot(rounded, weights, input_precision="ieee")
        inside = rows_in & (column < WIDTH)
        c = tl.load(current_rows + column, inside, 0.0).to(tl.float32)
        gate = tl.sigmoid(c)
        result = grad_active * gate * (1.0 + c * (1.0 - gate))
        target = grad_current + row * WIDTH + column
        tl.store(target, result.to(grad_current.dtype.element_ty), inside)


def forward(first: Tensor, current: Tensor, down: Tensor, up: Tensor, bias: Tensor) -> Tensor:
    """See `nova_kernels.ops.frame_scale_shift`."""
    launch, out = plan_forward(first, current, down, up, bias)
    launch.run()
    return out


def backward(
    grad: Tensor, first: Tensor, current: Tensor, down: Tensor, up: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of all five."""
    launch = plan_backward(grad, first, current, down, up, bias)
    launch.run()
    made = launch.arguments
    hidden, grad_hidden = made["hidden_out"], made["grad_hidden_out"]
    rows = grad.reshape(-1, grad.shape[-1])
    of_scale = (grad * first).reshape(-1, grad.shape[-1])
    grad_up = torch.cat([part.T.to(hidden.dtype) @ hidden for part in (of_scale, rows)])
    grad_bias = torch.cat([part.sum(0, dtype=torch.float32) for part in (of_scale, rows)])
    active = torch.nn.functional.silu(current).reshape(rows.shape)
    grad_down = grad_hidden.T @ active
    return made["grad_first"], made["grad_current"], grad_down, grad_up, grad_bias.to(bias.dtype)


def plan_forward(
    first: Tensor, current: Tensor, down: Tensor, up: Tensor, bias: Tensor
) -> tuple[Launch, Tensor]:
    """The launch of the forward pass, and the tensor that it fills."""
    out = new_rows(current, promoted(first, current))
    rows = as_rows(current, first)
    arguments = {
        **rows.arguments("current", "first"),
        **_weights(current, down, up, bias),
        "out": out,
    }
    return _launch(frame_scale_shift_forward_kernel, arguments), out


def plan_backward(
    grad: Tensor, first: Tensor, current: Tensor, down: Tensor, up: Tensor, bias: Tensor
) -> Launch:
    """The launch of the backward pass."""
    rows = as_rows(grad, first, current)
    rank = down.shape[0]
    arguments = {
        **rows.arguments("grad", "first", "current"),
        **_weights(current, down, up, bias),
        "grad_first": new_rows(first),
        "grad_current": new_rows(current),
        "hidden_out": current.new_empty(rows.count, rank),
        "grad_hidden_out": current.new_empty(rows.count, rank),
    }
    return _launch(frame_scale_shift_backward_kernel, arguments)


def _weights(current: Tensor, down: Tensor, up: Tensor, bias: Tensor) -> dict[str, Tensor | int]:
    rank = down.shape[0]
    dtypes = {tensor.dtype for tensor in (current, down, up, bias)}
    # Its matrix products take one dtype.
    if len(dtypes) > 1 or current.dtype not in (*HALF, torch.float32):
        raise BackendError(
            "frame_scale_shift: the Triton kernel takes one dtype, float16, bfloat16 or float32, "
            f"for all but the first features, got {', '.join(sorted(map(str, dtypes)))}; use "
            "backend='reference'"
        )
    if rank > MAX_RANK:
        raise BackendError(
            f"frame_scale_shift: the Triton kernel takes ranks up to {MAX_RANK}, got {rank}; "
            "use backend='reference'"
        )
    weights = {"down": down, "up": up, "bias": bias}
    return {"rank": rank, **{name: tensor.contiguous() for name, tensor in weights.items()}}


def _launch(kernel, arguments: dict) -> Launch:
    low, high = HALF_SETTINGS if arguments["current"].dtype in HALF else EXACT_SETTINGS
    block_rows, block_columns, num_warps = low if arguments["rank"] <= LOW_RANK else high
    constants = {
        "WIDTH": arguments["width"],
        "BLOCK_ROWS": block_rows,
        "BLOCK_COLUMNS": block_columns,
        "BLOCK_RANK": max(16, triton.next_power_of_2(arguments["rank"])),
    }
    grid = (ceil_div(arguments["num_rows"], block_rows),)
    return Launch(kernel, grid, arguments, constants, num_warps)
