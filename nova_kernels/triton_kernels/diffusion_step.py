"""Guidance, scheduler update and noise in Triton, one launch.

Without renormalisation every program has a block of a sample's values. With it a sample is one
program's, which first sums the squares of all its values; a set has few of them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nova_kernels.dispatch import new_rows
from nova_kernels.ops.diffusion_step import StepCoefficients
from nova_kernels.triton_kernels.launch import Launch, ceil_div

BLOCK = 1024


@triton.jit
def _guide(
    predictions, at, inside, per_pass, guidance, image_guidance, PASSES: tl.constexpr
):  # fmt: skip
    """cond, what renormalisation scales, and what is added after it; all float32."""
    cond = tl.load(predictions + at, inside, 0.0).to(tl.float32)
    if PASSES == 1:
        return cond, cond, tl.zeros_like(cond)
    uncond = tl.load(predictions + per_pass + at, inside, 0.0).to(tl.float32)
    if PASSES == 2:
        return cond, uncond + guidance * (cond - uncond), tl.zeros_like(cond)
    image = tl.load(predictions + per_pass + per_pass + at, inside, 0.0).to(tl.float32)
    return cond, uncond + guidance * (cond - image), image_guidance * (image - uncond)


@triton.jit
def diffusion_step_kernel(
    x, predictions, noise, outside, mask, out, factors, per_sample, per_pass, token_dim, sample,
    prediction, noise_scale, guidance, image_guidance, renorm, PASSES: tl.constexpr,
    RENORM: tl.constexpr, NOISY: tl.constexpr, HAS_OUTSIDE: tl.constexpr, MASKED: tl.constexpr,
    BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCKS blocks of values a program: all of a sample with RENORM, else one."""
    b = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCKS * BLOCK
    factor = 1.0
    if RENORM:
        cond_squares = tl.zeros([BLOCK], tl.float32)
        guided_squares = tl.zeros([BLOCK], tl.float32)
        for block in range(BLOCKS):
            value = first + block * BLOCK + tl.arange(0, BLOCK)
            counted = value < per_sample
            at = b * per_sample + value
            if MASKED:
                token = at // token_dim
                counted = counted & (tl.load(mask + token, counted, 0) != 0)
            cond, guided, _ = _guide(
                predictions, at, counted, per_pass, guidance, image_guidance, PASSES
            )
            cond_squares += cond * cond
            guided_squares += guided * guided
        cond_square, guided_square = tl.sum(cond_squares), tl.sum(guided_squares)
        if HAS_OUTSIDE:
            cond_square += tl.load(outside + b)
            guided_square += tl.load(outside + b)
        factor = tl.sqrt(cond_square) / tl.sqrt(guided_square)
        # 0 / 0, where nothing is predicted, stays NaN, as in the reference.
        factor = tl.where(factor < renorm, renorm, tl.where(factor > 1.0, 1.0, factor))
    for block in range(BLOCKS):
        value = first + block * BLOCK + tl.arange(0, BLOCK)
        inside = value < per_sample
        at = b * per_sample + value
        _, guided, after = _guide(
            predictions, at, inside, per_pass, guidance, image_guidance, PASSES
        )
        before = tl.load(x + at, inside, 0.0)
        result = sample * before.to(tl.float32) + prediction * (guided * factor + after)
        if NOISY:
            result += noise_scale * tl.load(noise + at, inside, 0.0).to(tl.float32)
        result = result.to(out.dtype.element_ty)
        if MASKED:
            chosen = tl.load(mask + at // token_dim, inside, 0) != 0
            result = tl.where(chosen, result, before)
        tl.store(out + at, result, inside)
    if tl.program_id(1) == 0:
        tl.store(factors + b, factor)


def step(
    x: Tensor,
    predictions: Tensor,
    numbers: StepCoefficients,
    noise: Tensor | None,
    outside: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `nova_kernels.ops.diffusion_step`."""
    launch = plan(x, predictions, numbers, noise, outside, mask)
    launch.run()
    return launch.arguments["out"], launch.arguments["factors"]


def plan(
    x: Tensor,
    predictions: Tensor,
    numbers: StepCoefficients,
    noise: Tensor | None,
    outside: Tensor | None,
    mask: Tensor | None,
) -> Launch:
    """The launch of a step; it fills its arguments out and factors."""
    x, predictions = x.contiguous(), predictions.contiguous()
    passes, batch, tokens, token_dim = predictions.shape
    renormalises = passes > 1 and numbers.renorm < 1
    blocks = ceil_div(tokens * token_dim, BLOCK)
    # What is not given is not read: any tensor takes its place.
    arguments = {
        "x": x,
        "predictions": predictions,
        "noise": x if noise is None else noise.contiguous(),
        "outside": x if outside is None else outside.contiguous(),
        "mask": x if mask is None else mask.contiguous(),
        "out": new_rows(x),
        "factors": torch.empty(batch, dtype=torch.float32, device=x.device),
        "per_sample": tokens * token_dim,
        "per_pass": batch * tokens * token_dim,
        "token_dim": token_dim,
        "sample": numbers.sample,
        "prediction": numbers.prediction,
        "noise_scale": numbers.noise,
        "guidance": numbers.guidance,
        "image_guidance": numbers.image_guidance,
        "renorm": numbers.renorm,
    }
    constants = {
        "PASSES": passes,
        "RENORM": renormalises,
        "NOISY": noise is not None,
        "HAS_OUTSIDE": outside is not None,
        "MASKED": mask is not None,
        "BLOCKS": max(blocks, 1) if renormalises else 1,
        "BLOCK": BLOCK,
    }
    grid = (batch, 1 if renormalises else max(blocks, 1))
    return Launch(diffusion_step_kernel, grid, arguments, constants)
