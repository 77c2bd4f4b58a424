"""GELU(x @ weight.T + bias) in Triton: a program has a tile of the product in registers."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nova_kernels.errors import BackendError
from nova_kernels.triton_kernels.launch import Launch, ceil_div


@dataclass(frozen=True)
class TileSetting:
    """Rows, outputs and inputs a tile, warps and pipeline stages."""

    block_rows: int
    block_outputs: int
    block_inputs: int
    num_warps: int
    num_stages: int


HALF = (torch.float16, torch.bfloat16)
# For half precision, by the rows of the product, at least so many. Chosen by what compiles without
# spills on both architectures; to be tuned on GPUs.
SETTINGS = {
    1024: TileSetting(128, 256, 64, 8, 3),
    128: TileSetting(64, 128, 64, 4, 4),
    0: TileSetting(32, 64, 128, 4, 4),
}
# Where the widest tile leaves no registers: two things are stored, or inputs are so few that the
# loop has no more steps than the pipeline stages (at 192 inputs it spills on sm_80).
SMALLER = {1024: TileSetting(128, 128, 64, 8, 3), 128: SETTINGS[128], 0: SETTINGS[0]}
FEW_INPUTS = SETTINGS[1024].block_inputs * SETTINGS[1024].num_stages
# Inputs that end inside a tile, whose loads are narrow and masked.
RAGGED = TileSetting(64, 64, 32, 4, 3)
# Tensor cores do not keep the precision of float32; without them only small tiles fit registers.
EXACT = TileSetting(32, 32, 32, 4, 2)
# Tiles of rows that neighbouring programs share, so that these and their weights stay in the L2
# cache.
GROUP = 8


@triton.jit
def _finish(total, bias, out, hidden, row, output, rows_in, outputs, KEEP_HIDDEN: tl.constexpr):
    """Add the bias to part of a product, activate and store it."""
    outputs_in = output < outputs
    total += tl.load(bias + output, outputs_in, 0.0).to(tl.float32)
    inside = rows_in & outputs_in
    target = row * outputs + output
    if KEEP_HIDDEN:
        tl.store(hidden + target, total.to(hidden.dtype.element_ty), inside)
    activated = 0.5 * total * (1.0 + tl.math.erf(total * 0.7071067811865476))
    tl.store(out + target, activated.to(out.dtype.element_ty), inside)


@triton.jit
def linear_gelu_kernel(
    x, weight, bias, out, hidden, num_rows, outputs, x_row, weight_output, weight_input,
    INPUTS: tl.constexpr, KEEP_HIDDEN: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_OUTPUTS: tl.constexpr, BLOCK_INPUTS: tl.constexpr,
):  # fmt: skip
    row_tiles, output_tiles = tl.cdiv(num_rows, BLOCK_ROWS), tl.cdiv(outputs, BLOCK_OUTPUTS)
    program = tl.program_id(0)
    first = program // (GROUP * output_tiles) * GROUP
    in_group = min(row_tiles - first, GROUP)
    within = program % (GROUP * output_tiles)
    row = (first + within % in_group).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    first_output = within // in_group * BLOCK_OUTPUTS
    output = first_output + tl.arange(0, BLOCK_OUTPUTS)[None, :]
    rows_in, outputs_in = row < num_rows, output < outputs
    total = tl.zeros([BLOCK_ROWS, BLOCK_OUTPUTS], tl.float32)
    for start in range(0, INPUTS, BLOCK_INPUTS):
        i = start + tl.arange(0, BLOCK_INPUTS)
        of_rows, of_outputs = rows_in, outputs_in
        if INPUTS % BLOCK_INPUTS != 0:
            of_rows, of_outputs = (
                rows_in & (i[None, :] < INPUTS),
                outputs_in & (i[:, None] < INPUTS),
            )
        values = tl.load(x + row * x_row + i[None, :], of_rows, 0.0)
        weights = tl.load(
            weight + output * weight_output + i[:, None] * weight_input, of_outputs, 0.0
        )
        total = tl.dot(values, weights, total, input_precision="ieee")
    # In halves, so that registers hold the intermediate values of the activation for one at a time.
    halves = tl.permute(tl.reshape(total, [BLOCK_ROWS, 2, BLOCK_OUTPUTS // 2]), [0, 2, 1])
    left, right = tl.split(halves)
    output = first_output + tl.arange(0, BLOCK_OUTPUTS // 2)[None, :]
    _finish(left, bias, out, hidden, row, output, rows_in, outputs, KEEP_HIDDEN)
    output += BLOCK_OUTPUTS // 2
    _finish(right, bias, out, hidden, row, output, rows_in, outputs, KEEP_HIDDEN)


def forward(x: Tensor, weight: Tensor, bias: Tensor, keep_hidden: bool) -> tuple[Tensor, Tensor]:
    """See `nova_kernels.ops.linear_gelu`; also what GELU was applied to, or an empty tensor."""
    launch, out, hidden = plan(x, weight, bias, keep_hidden)
    launch.run()
    return out, hidden


def plan(
    x: Tensor, weight: Tensor, bias: Tensor, keep_hidden: bool
) -> tuple[Launch, Tensor, Tensor]:
    """The launch and what it fills: the result, and what GELU is applied to."""
    if not x.dtype == weight.dtype == bias.dtype or x.dtype not in (*HALF, torch.float32):
        raise BackendError(
            "linear_gelu: the kernel takes one dtype, float16, bfloat16 or float32, got "
            f"{x.dtype}, {weight.dtype} and {bias.dtype}; use backend='reference'"
        )
    outputs, inputs = weight.shape
    out = x.new_empty(*x.shape[:-1], outputs)
    hidden = torch.empty_like(out) if keep_hidden else out.new_empty(0)
    rows = x.reshape(-1, inputs)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    setting = setting_of(x.dtype, len(rows), inputs, keep_hidden)
    grid = ceil_div(len(rows), setting.block_rows) * ceil_div(outputs, setting.block_outputs)
    arguments = {
        "x": rows,
        "weight": weight,
        "bias": bias.contiguous(),
        "out": out,
        "hidden": hidden if keep_hidden else out,
        "num_rows": len(rows),
        "outputs": outputs,
        "x_row": rows.stride(0),
        "weight_output": weight.stride(0),
        "weight_input": weight.stride(1),
    }
    constants = {
        "INPUTS": inputs,
        "KEEP_HIDDEN": keep_hidden,
        "GROUP": GROUP,
        "BLOCK_ROWS": setting.block_rows,
        "BLOCK_OUTPUTS": setting.block_outputs,
        "BLOCK_INPUTS": setting.block_inputs,
    }
    launch = Launch(
        linear_gelu_kernel, (grid,), arguments, constants, setting.num_warps, setting.num_stages
    )
    return launch, out, hidden


def setting_of(dtype: torch.dtype, num_rows: int, inputs: int, keep_hidden: bool) -> TileSetting:
    """The launch setting of a product with so many rows and inputs."""
    if dtype not in HALF:
        return EXACT
    if inputs % SETTINGS[1024].block_inputs:
        return RAGGED
    settings = SMALLER if keep_hidden or inputs <= FEW_INPUTS else SETTINGS
    return next(setting for least, setting in settings.items() if num_rows >= least)
