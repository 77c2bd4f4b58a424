"""Kernels where every tensor has strides of its own, in the batch too, gradients included."""

import pytest
import torch
from kernel_testing import (
    TRITON_AND_CUDA,
    assert_as_exact_as_torch,
    in_float64,
    needs_triton,
    poisoned,
    randn,
)
from test_block_causal_attention import definition

import nova_kernels
from nova_kernels import StepCoefficients
from nova_kernels.ops import diffusion_step, frame_scale_shift, residual_norm, rope3d, scale_shift
from nova_kernels.rows import as_rows


def spread(*shape, order, gap, dtype=torch.float32, step=1):
    """Normal numbers whose leading axes lie in memory in `order`, with a gap behind every row.

    Args:
        step: stride of the last axis.
    """
    width = (shape[-1] + gap) * step
    stored = randn(*(shape[axis] for axis in order), width, dtype=dtype, seed=gap)
    places = [order.index(axis) for axis in range(len(order))]
    return stored.permute(*places, len(order))[..., : shape[-1] * step : step]


def rows(order, gap, width=48):
    return spread(3, 4, width, order=order, gap=gap).requires_grad_()


def vector(width, seed):
    return randn(width, 2, seed=seed)[:, 1].requires_grad_()


def check(run, plain, leaves, grad):
    """Result and gradients of run(*leaves), held against plain(*leaves)."""
    exact_leaves = in_float64(*leaves)
    exact, by_torch = plain(*exact_leaves), plain(*leaves)
    with poisoned():
        result = run(*leaves)
        gradients = torch.autograd.grad(result, leaves, grad)
    assert_as_exact_as_torch(result, by_torch, exact)
    of_torch = torch.autograd.grad(by_torch, leaves, grad)
    right = torch.autograd.grad(exact, exact_leaves, grad.double())
    for found in zip(gradients, of_torch, right, strict=True):
        assert_as_exact_as_torch(*found)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("prefix", [0, 19])
def test_attention(prefix, step, dtype):
    lengths, bidirectional, scale = [20, 17], [True, False], 0.3

    def leaf(tokens, **layout):
        return spread(3, 2, tokens, 32, dtype=dtype, **layout).requires_grad_()

    q, k = leaf(37, order=(0, 2, 1), gap=1), leaf(37, order=(2, 0, 1), gap=2)
    leaves = [q, k, leaf(37, order=(1, 0, 2), gap=3, step=step)]
    if prefix:
        leaves += [leaf(prefix, order=(0, 2, 1), gap=4), leaf(prefix, order=(2, 1, 0), gap=5)]

    def run(q, k, v, *prefix_kv):
        return nova_kernels.block_causal_attention(
            *(q, k, v, lengths),
            bidirectional=bidirectional,
            prefix_kv=prefix_kv or None,
            scale=scale,
            backend="triton",
        )

    def plain(q, k, v, *prefix_kv):
        # The definition's scale is 1 / sqrt(32).
        return definition(q * (scale * 32**0.5), k, v, lengths, bidirectional, prefix_kv)[0]

    grad = spread(3, 2, 37, 32, order=(1, 2, 0), gap=6, dtype=dtype, step=step)
    check(run, plain, leaves, grad)


@pytest.mark.parametrize("backend", TRITON_AND_CUDA)
@pytest.mark.parametrize("add_one", [True, False])
def test_scale_shift(add_one, backend):
    def run(x, scale, shift):
        return nova_kernels.scale_shift(x, scale, shift, add_one=add_one, backend=backend)

    def plain(x, scale, shift):
        return scale_shift.reference(x, scale if add_one else scale - 1, shift)

    leaves = [rows((0, 1), 1), rows((1, 0), 2), rows((0, 1), 3)]
    check(run, plain, leaves, rows((1, 0), 7).detach())


@pytest.mark.parametrize("backend", TRITON_AND_CUDA)
def test_residual_norm(backend):
    def run(x, h, weight, bias, gate):
        return nova_kernels.residual_norm(x, h, weight, bias, gate=gate, backend=backend)

    leaves = [rows((0, 1), 1), rows((1, 0), 2), vector(48, 3), vector(48, 4), rows((0, 1), 5)]
    check(run, residual_norm.reference, leaves, rows((1, 0), 7).detach())


@needs_triton
def test_frame_scale_shift():
    def run(*leaves):
        return nova_kernels.frame_scale_shift(*leaves, backend="triton")

    weights = [randn(*shape, seed=3).t().requires_grad_() for shape in ((48, 5), (5, 96))]
    leaves = [rows((0, 1), 1), rows((1, 0), 2), *weights, vector(96, 5)]
    check(run, frame_scale_shift.reference, leaves, rows((1, 0), 7).detach())


def rotary_table(*shape):
    """Cosines and sines as a part of larger tensors."""
    return [randn(4, *shape[1:-1], shape[-1] + 2, seed=s)[:3, ..., : shape[-1]] for s in (1, 2)]


@needs_triton
def test_rope3d():
    cos, sin = rotary_table(3, 4, 4)

    def run(qkv):
        return nova_kernels.rope3d(qkv, cos, sin, 2, backend="triton")

    def plain(qkv):
        table = cos.to(qkv.dtype), sin.to(qkv.dtype)
        return rope3d.reference(qkv.unflatten(-1, (6, -1)), *table, 4).flatten(2)

    check(run, plain, [rows((1, 0), 3)], rows((1, 0), 7).detach())


@needs_triton
@pytest.mark.parametrize("order, gap", [((0, 1, 2), 0), ((2, 1, 0), 3)])
def test_rotate_heads(order, gap):
    x, table = spread(3, 2, 5, 8, order=order, gap=gap), rotary_table(3, 5, 4)
    result, right = (
        rope3d.rotate_heads(x, *table, backend=backend) for backend in ("triton", "reference")
    )
    torch.testing.assert_close(result, right)


@needs_triton
def test_diffusion_step():
    x, noise = spread(3, 4, 8, order=(1, 0), gap=1), spread(3, 4, 8, order=(1, 0), gap=2)
    predictions = spread(3, 3, 4, 8, order=(1, 2, 0), gap=3)
    mask = (torch.arange(24, device=x.device).view(4, 6) % 3 > 0)[:, :3].t()
    outside = torch.arange(1.0, 7.0, device=x.device)[::2]
    step = StepCoefficients(0.9, -0.3, 0.2, 5.0, 1.5, 0.01)
    options = {"noise": noise, "outside": outside, "mask": mask}
    results = nova_kernels.diffusion_step(x, predictions, step, **options, backend="triton")
    right = diffusion_step.reference(x, predictions, step, noise, outside, mask)
    for found in zip(results, right, strict=True):
        torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


def test_rows_that_a_kernel_would_read_beyond():
    with pytest.raises(ValueError, match=r"rows of different shapes: \[\(4, 8\), \(3, 8\)\]"):
        as_rows(randn(4, 8), randn(3, 8))
