"""Every Triton kernel in every launch setting that real shapes use, planned on the meta device."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

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
DTYPES = (HALF, torch.float16, torch.float32)
# Both half precisions take the same registers and memory, and differ in how values are converted,
# which one size shows.
SIZED_DTYPES = (HALF, torch.float32)
# Widths of released models, of their diffusion MLPs, and of the model in this package. Row kernels
# are compiled for the padded width, which several of them share.
WIDTHS = (192, 768, 1024, 1280, 1536)
# Width and rank of cross-frame layers: of the two video models, and the largest.
MIXERS = ((192, 128), (1024, 24), (1536, 128))
EPS = 1e-6


@dataclass(frozen=True)
class CompileCase:
    """A launch and what it is of.

    Attributes:
        op, case: names; the case says shape and dtype.
        launch: planned on the meta device.
        real: whether a shape of real use has it; then its loops must not spill.
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
        in_full = width == min(used)
        for dtype in DTYPES if in_full else SIZED_DTYPES if width in used else (HALF,):
            case = f"width {width}, {_name(dtype)}"
            all_variants = in_full and dtype == HALF
            for op, variant, launch in _row_launches(width, dtype, all_variants):
                yield CompileCase(op, case + variant, launch, width in used)


def _row_launches(
    width: int, dtype: torch.dtype, all_variants: bool
) -> Iterator[tuple[str, str, Launch]]:
    """Op, variant and launch; without `all_variants`, those that hold most only."""
    x, vector = _meta(1000, width, dtype=dtype), _meta(width, dtype=dtype)
    yield "scale_shift", "", scale_shift.plan_forward(x, x, x, EPS, True)[0]
    yield "scale_shift", "", scale_shift.plan_backward(x, x, x, EPS, True)[0]
    if all_variants:  # in the denoise loop, which has no gradient
        yield "scale_shift", ", no one added", scale_shift.plan_forward(x, x, x, EPS, False)[0]
    for affine, gate in product((vector, None), (x, None)) if all_variants else [(vector, x)]:
        variant = ", affine" if affine is not None else ""
        variant += ", gate" if gate is not None else ""
        norm = (affine, affine, gate, EPS)
        yield "residual_norm", variant, residual_norm.plan_forward(x, x, *norm, x)
        yield "residual_norm", variant, residual_norm.plan_backward(x, x, *norm)[0]


def _linear_gelu() -> Iterator[CompileCase]:
    # Of the sizes, only whether they are multiples of 16 makes another kernel.
    for outputs, dtype in product((4096, 33), DTYPES):
        x = _meta(3601, outputs, dtype=dtype)
        case = f"GELU of 3601 x {outputs}, {_name(dtype)}"
        yield CompileCase("linear_gelu", case, linear_gelu.plan(x, x))


def _frame_scale_shift() -> Iterator[CompileCase]:
    sizes = [*product(MIXERS, SIZED_DTYPES), (MIXERS[0], torch.float16)]
    for (width, rank), dtype in sizes:
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


def _rope3d() -> Iterator[CompileCase]:
    # All real numbers of heads give one kernel for a size, in place or not.
    heads = 16
    for head_dim, dtype, backwards in product((64, 96), DTYPES, (False, True)):
        x = _meta(2, 1800, 3 * heads, head_dim, dtype=dtype)
        table = _meta(1, 1800, head_dim // 2, dtype=dtype)
        launch = rope3d.plan(x, table, table, torch.empty_like(x), 2 * heads, backwards)
        case = f"{heads} heads of {head_dim}, {_name(dtype)}" + (", backward" if backwards else "")
        yield CompileCase("rope3d", case, launch)


def _diffusion_step() -> Iterator[CompileCase]:
    guidances = ((1, 1.0), (2, 1.0), (2, 0.5), (3, 1.0), (3, 0.5))
    variants = [(HALF, *variant) for variant in product(guidances, (False, True))]
    # In other dtypes those that hold most.
    variants += [(dtype, guidances[-1], True) for dtype in (torch.float16, torch.float32)]
    for dtype, (passes, renorm), masked in variants:
        x = _meta(24, 36, 64, dtype=dtype)
        step = StepCoefficients(1.0, -0.04, noise=0.1, guidance=5.0, renorm=renorm)
        # Whole frames have a mask, packed sets have tokens outside.
        mask = _meta(24, 36, dtype=torch.bool) if masked else None
        outside = None if masked else _meta(24, dtype=torch.float32)
        predictions = _meta(passes, *x.shape, dtype=dtype)
        for noise in (x, None) if passes == 2 else (x,):
            launch = diffusion_step.plan(x, predictions, step, noise, outside, mask)
            parts = [f"{passes} passes", _name(dtype)]
            parts += ["renormalised"] * (renorm < 1) + ["masked"] * masked
            parts += ["noise"] * (noise is not None)
            yield CompileCase("diffusion_step", ", ".join(parts), launch)


def _attention() -> Iterator[CompileCase]:
    # A tile setting each, as these take long to compile: heads of 128 have the tiles of 96 without
    # the masks, float16 has those of bfloat16, and float32 has the same for all heads.
    kinds = [(64, HALF, True), (96, HALF, True), (32, torch.float16, True)]
    kinds += [(96, torch.float32, True)]
    # Without a prefix there is a loop less: only what released models are trained with.
    kinds += [(64, HALF, False), (96, HALF, False)]
    for head_dim, dtype, with_prefix in kinds:
        case = f"head_dim {head_dim}, {_name(dtype)}" + (", prefix" if with_prefix else "")
        for launch in _attention_launches(head_dim, dtype, with_prefix):
            # Kernels that do not ask for a prefix are the same with one and without.
            if with_prefix or "HAS_PREFIX" in launch.constants:
                yield CompileCase("block_causal_attention", case, launch)


def _attention_launches(head_dim: int, dtype: torch.dtype, with_prefix: bool) -> list[Launch]:
    # The released video model: prompt, motion and frame 0, then eight frames.
    layout = BlockLayout.of([618] + [360] * 8)
    x, prefix = (_meta(2, 16, n, head_dim, dtype=dtype) for n in (layout.num_tokens, 720))
    lse = _meta(2, 16, layout.num_tokens, dtype=torch.float32)
    tensors = (x, x, x, prefix, prefix) if with_prefix else (x, x, x, None, None)
    forward = block_causal_attention.plan_forward(*tensors, layout, 0.1)
    return [forward, *block_causal_attention.plan_backward(x, *tensors, x, lse, layout, 0.1)]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
