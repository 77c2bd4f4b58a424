"""Every Triton kernel in every launch setting that real shapes use, planned on the meta device."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nova_kernels.block_layout import BlockLayout
from nova_kernels.ops.diffusion_step import StepCoefficients
from nova_kernels.triton_kernels import (
    block_causal_attention,
    diffusion_step,
    frame_scale_shift,
    linear_gelu,
    residual_norm,
    rope3d,
    scale_shift,
)
from nova_kernels.triton_kernels.launch import Launch
from nova_kernels.triton_kernels.row_settings import SETTINGS, row_setting

HALF = torch.bfloat16
# Widths of released models, of their diffusion MLPs, and of the model in this package. Row kernels
# are compiled for the padded width, which several of them share.
WIDTHS = (192, 768, 1024, 1280, 1536)
EPS = 1e-6


@dataclass(frozen=True)
class CompileCase:
    """A launch and what it is of.

    Attributes:
        op, case: names; the case says shape and dtype.
        launch: planned on the meta device.
        real: whether a shape of real use has it; then it must not spill.
    """

    op: str
    case: str
    launch: Launch
    real: bool = True


def compile_cases() -> Iterator[CompileCase]:
    """All cases, op after op."""
    for make in (_rows, _linear_gelu, _frame_scale_shift, _rope3d, _diffusion_step, _attention):
        yield from make()


def _meta(*shape: int, dtype: torch.dtype = HALF) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _rows() -> Iterator[CompileCase]:
    used = {row_setting(width).block_width for width in WIDTHS}
    for width in SETTINGS:
        real = width in used
        for dtype in (HALF, torch.float32) if real else (HALF,):
            case = f"width {width}, {_name(dtype)}"
            x, vector = _meta(1000, width, dtype=dtype), _meta(width, dtype=dtype)
            launch, _ = scale_shift.plan_forward(x, x, x, EPS, True)
            yield CompileCase("scale_shift", case, launch, real)
            launch, *_ = scale_shift.plan_backward(x, x, x, EPS, True)
            yield CompileCase("scale_shift", case, launch, real)
            for gate in (None, x):
                of_gate = case + (", gate" if gate is not None else "")
                launch = residual_norm.plan_forward(x, x, vector, vector, gate, EPS, x)
                yield CompileCase("residual_norm", of_gate, launch, real)
                launch, *_ = residual_norm.plan_backward(x, x, vector, vector, gate, EPS)
                yield CompileCase("residual_norm", of_gate, launch, real)


def _frame_scale_shift() -> Iterator[CompileCase]:
    for width, rank, dtype in ((1024, 24, HALF), (192, 128, HALF), (1024, 24, torch.float32)):
        case = f"width {width}, rank {rank}, {_name(dtype)}"
        x = _meta(2, 8, 360, width, dtype=dtype)
        weights = [
            _meta(*shape, dtype=dtype) for shape in ((rank, width), (2 * width, rank), (2 * width,))
        ]
        first = x[:, :1].expand_as(x)
        launch, _ = frame_scale_shift.plan_forward(first, x, *weights)
        yield CompileCase("frame_scale_shift", case, launch)
        launch = frame_scale_shift.plan_backward(x, first, x, *weights)
        yield CompileCase("frame_scale_shift", case, launch)


def _linear_gelu() -> Iterator[CompileCase]:
    # Rows of a small set, of a frame and of many; in float32 there is one setting.
    sizes = [(rows, 1024, HALF) for rows in (8, 720, 3600)]
    for rows, width, dtype in [*sizes, (3600, 192, torch.float32)]:
        x, bias = _meta(rows, width, dtype=dtype), _meta(4 * width, dtype=dtype)
        by_rows = _meta(4 * width, width, dtype=dtype)
        by_columns = _meta(width, 4 * width, dtype=dtype).t()
        for weight, layout in ((by_rows, "rows"), (by_columns, "columns")):
            for keep_hidden in (False, True):
                case = f"{rows} x {width}, weight by {layout}, {_name(dtype)}"
                launch, *_ = linear_gelu.plan(x, weight, bias, keep_hidden)
                case += ", keeping what GELU is applied to" if keep_hidden else ""
                yield CompileCase("linear_gelu", case, launch)


def _rope3d() -> Iterator[CompileCase]:
    for heads, head_dim in ((12, 64), (16, 64), (16, 96)):
        x, table = _meta(2, 1800, 3 * heads, head_dim), _meta(1, 1800, head_dim // 2)
        case = f"{heads} heads of {head_dim}, {_name(HALF)}"
        for in_place in (True, False):
            out = x if in_place else torch.empty_like(x)
            launch = rope3d.plan(x, table, table, out, 2 * heads, False)
            yield CompileCase("rope3d", case + (", in place" if in_place else ""), launch)


def _diffusion_step() -> Iterator[CompileCase]:
    x = _meta(24, 36, 16)
    for passes, renorm in ((1, 1.0), (2, 1.0), (2, 0.5), (3, 0.5)):
        step = StepCoefficients(1.0, -0.04, noise=0.1, guidance=5.0, renorm=renorm)
        outside = _meta(24, dtype=torch.float32)
        launch = diffusion_step.plan(x, _meta(passes, 24, 36, 16), step, x, outside, None)
        case = f"{passes} passes" + (", renormalised" if renorm < 1 else "")
        yield CompileCase("diffusion_step", case, launch)


def _attention() -> Iterator[CompileCase]:
    # The released video model: prompt, motion and frame 0, then eight frames.
    layout = BlockLayout.of([618] + [360] * 8)
    kinds = [(head_dim, HALF) for head_dim in block_causal_attention.FORWARD]
    for head_dim, dtype in [*kinds, (64, torch.float32)]:
        case = f"head_dim {head_dim}, {_name(dtype)}"
        x, prefix = (_meta(2, 16, n, head_dim, dtype=dtype) for n in (layout.num_tokens, 720))
        lse = _meta(2, 16, layout.num_tokens, dtype=torch.float32)
        qkv_and_prefix = (x, x, x, prefix, prefix)
        launch = block_causal_attention.plan_forward(*qkv_and_prefix, layout, 0.1)
        yield CompileCase("block_causal_attention", case, launch)
        for launch in block_causal_attention.plan_backward(x, *qkv_and_prefix, x, lse, layout, 0.1):
            yield CompileCase("block_causal_attention", case, launch)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
