"""The CUDA kernels of rows, scale_shift and residual_norm, emulated on the CPU thread by thread."""

import pytest
import torch
from cuda_emulation import emulated_extension, needs_compiler
from kernel_testing import assert_as_exact_as_torch, in_float64, poisoned

from nova_kernels import BackendError
from nova_kernels.cuda_kernels import residual_norm, scale_shift
from nova_kernels.cuda_kernels.extension import DTYPES
from nova_kernels.ops import residual_norm as residual_norm_op
from nova_kernels.ops import scale_shift as scale_shift_op

pytestmark = needs_compiler

# Rows, width, and whether half precision is read and written 16 bytes at a time.
SIZES = [
    (1, 1, False),
    (5, 3, False),
    (6, 8, True),
    (9, 33, False),
    (5, 192, True),
    (2, 1027, False),
    (3, 1280, True),
]


def emulator(seed=0):
    module = emulated_extension()
    module.set_seed(seed)
    return module


def normal(shape, dtype=torch.float32, seed=0):
    """On the CPU, where the emulator runs, whatever the machine has."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def off_alignment(tensor):
    """The same values in rows that begin between multiples of 16 bytes."""
    wider = tensor.new_zeros(*tensor.shape[:-1], tensor.shape[-1] + 1)
    wider[..., 1:] = tensor
    return wider[..., 1:]


def check(results, call, inputs, grad):
    """(result, gradients of the inputs that are there) against plain torch, and it in float64."""
    found = []
    for tensors in (inputs, in_float64(*inputs)):
        leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
        given = [leaf for leaf in leaves if leaf is not None]
        out = call(*leaves)
        found.append([out, *torch.autograd.grad(out, given, grad.to(out.dtype))])
    for ours, plain, exact in zip(results, *found, strict=True):
        assert ours.isfinite().all()
        if exact.norm() > 1e-12:  # a norm of one value has no gradient
            assert_as_exact_as_torch(ours, plain, exact)


def run_scale_shift(x, scale, shift, grad, add_one=True, seed=0):
    """Result and gradients of x, scale and shift, all of one shape."""
    eps, module = scale_shift_op.EPS, emulator(seed)
    with poisoned():
        out = scale_shift.forward(x, scale, shift, eps, add_one, module=module)
        gradients = scale_shift.backward(grad, x, scale, eps, add_one, module=module)
    return [out, *gradients, grad]


def run_residual_norm(x, h, weight, bias, gate, grad, seed=0):
    """Result and gradients of what is given."""
    eps, module = residual_norm_op.EPS, emulator(seed)
    with poisoned():
        out = torch.empty(x.shape, dtype=x.dtype)
        residual_norm.forward(x, h, weight, bias, gate, eps, out, module=module)
        gradients = residual_norm.backward(grad, h, weight, bias, gate, eps, module=module)
    kept = [g for g, t in zip(gradients, (h, weight, bias, gate), strict=True) if t is not None]
    assert all(g.numel() == 0 for g in gradients if all(g is not k for k in kept))
    return [out, grad, *kept]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, width, wide", SIZES)
def test_scale_shift(rows, width, wide, dtype):
    x = normal((rows, width), dtype, 1) * 3 + 1
    scale, shift, grad = (normal((rows, width), dtype, seed) for seed in (2, 3, 4))
    results = run_scale_shift(x, scale, shift, grad)
    assert emulator().was_wide() == wide
    check(results, scale_shift_op.reference, (x, scale, shift), grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, width, wide", SIZES)
def test_residual_norm(rows, width, wide, dtype):
    shape = rows, width
    x, h, gate, grad = (normal(shape, dtype, seed) for seed in (1, 2, 3, 4))
    weight, bias = normal(width, dtype, 5), normal(width, dtype, 6)
    results = run_residual_norm(x, h, weight, bias, gate, grad)
    assert emulator().was_wide() == wide
    check(results, residual_norm_op.reference, (x, h, weight, bias, gate), grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e15, 1e-7, 1e-40])
def test_large_tiny_and_denormal_inputs(size, dtype):
    """1e-7 is denormal in float16, 1e-40 in the other dtypes."""
    normed = normal((3, 192), dtype, 1) * min(size, torch.finfo(dtype).max / 20)
    x, scale, shift, grad = (normal((3, 192), dtype, seed) for seed in (2, 3, 4, 5))
    results = run_scale_shift(normed, scale, shift, grad)
    check(results, scale_shift_op.reference, (normed, scale, shift), grad)
    weight, bias = normal(192, dtype, 6), normal(192, dtype, 7)
    inputs = x, normed, weight, bias, scale
    check(run_residual_norm(*inputs, grad), residual_norm_op.reference, inputs, grad)


@pytest.mark.parametrize("affine, gated", [(True, False), (False, True), (False, False)])
def test_residual_norm_without_gate_or_affine_part(affine, gated):
    x, h, grad = (normal((3, 40), torch.bfloat16, seed) for seed in (1, 2, 3))
    weight, bias = (normal(40, torch.bfloat16, s) if affine else None for s in (4, 5))
    gate = normal((3, 40), torch.bfloat16, 6) if gated else None
    results = run_residual_norm(x, h, weight, bias, gate, grad)
    check(results, residual_norm_op.reference, (x, h, weight, bias, gate), grad)


@pytest.mark.parametrize("width", [520, 8192])
def test_widest_rows_and_rows_of_two_warps(width):
    x, scale, shift, grad = (normal((1, width), torch.float16, seed) for seed in range(4))
    results = run_scale_shift(x, scale, shift, grad)
    check(results, scale_shift_op.reference, (x, scale, shift), grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_addresses_that_do_not_allow_wide_accesses(dtype):
    x, scale, shift, grad = (normal((2, 3, 64), dtype, seed) for seed in range(4))
    inputs = x, off_alignment(scale), shift
    results = run_scale_shift(*inputs, grad)
    assert not emulator().was_wide()
    check(results, scale_shift_op.reference, inputs, grad)
    weight = normal(65, dtype, 5)[1:]
    inputs = x, scale, weight, weight, shift
    results = run_residual_norm(*inputs, grad)
    assert not emulator().was_wide()
    check(results, residual_norm_op.reference, inputs, grad)


def test_strides_and_broadcasting():
    """Transposed rows, rows shared along either axis, and a width that is not contiguous."""
    shape = 3, 5, 48
    x, grad = normal((10, 3, 48), seed=1).transpose(0, 1)[:, ::2], normal(shape, seed=4)
    scale = normal((3, 1, 48), seed=2).expand(shape)
    shift = normal((3, 96), seed=3)[:, ::2][:, None].expand(shape)
    results = run_scale_shift(x, scale, shift, grad)
    assert emulator().was_wide()
    check(results, scale_shift_op.reference, (x, scale, shift), grad)
    gate = normal((5, 48), seed=5).expand(shape)
    vector = normal((48, 2), seed=6)[:, 0]
    results = run_residual_norm(x, scale, vector, vector, gate, grad)
    check(results, residual_norm_op.reference, (x, scale, vector, vector, gate), grad)
    # A gradient of a sum is one value everywhere.
    ones = torch.ones(()).expand(shape)
    results = run_scale_shift(x, scale, shift, ones)
    check(results, scale_shift_op.reference, (x, scale, shift), ones)


@pytest.mark.parametrize("rows", [7, 8, 19])
def test_strips_of_rows(rows):
    """Sums of the gradients of weight and bias over strips, the last of which is not full."""
    assert residual_norm.strip_length(rows) == 8
    x, h, gate, grad = (normal((rows, 24), torch.float16, seed) for seed in (1, 2, 3, 4))
    weight, bias = normal(24, torch.float16, 5), normal(24, torch.float16, 6)
    results = run_residual_norm(x, h, weight, bias, gate, grad)
    check(results, residual_norm_op.reference, (x, h, weight, bias, gate), grad)


def test_lengths_of_strips():
    lengths = [residual_norm.strip_length(rows) for rows in (1, 4096, 16384, 100_000)]
    assert lengths == [8, 8, 32, 64]


def test_in_place():
    eps, module = residual_norm_op.EPS, emulator()
    h, gate = normal((3, 4, 40), seed=2), normal((3, 4, 40), seed=3)
    merged = normal((4, 3, 40), seed=1).transpose(0, 1)
    # Three strides, which the kernel does not take: the result has to come back from a copy.
    split = normal((4, 5, 2, 6, 40), seed=1).transpose(0, 1)[::2, :, :, ::2]
    for x in (merged, split):
        branch, factor = (t.expand(3, 4, 40) for t in (h, gate))
        if x is split:
            branch, factor = (normal(split.shape, seed=s) for s in (4, 5))
        expected = residual_norm_op.reference(x, branch, gate=factor)
        residual_norm.forward(x, branch, None, None, factor, eps, x, module=module)
        torch.testing.assert_close(x, expected)
    # The branch itself may be what the result goes into.
    x = normal((5, 600), torch.float16, 7)
    expected = residual_norm_op.reference(x.double(), x.double()).half()
    residual_norm.forward(x, x, None, None, None, eps, x, module=module)
    torch.testing.assert_close(x, expected)


def test_several_dtypes():
    """As automatic mixed precision has them: kernels get copies in the promoted dtype."""
    module = emulator()
    x, h, gate, grad = (normal((3, 40), seed=s) for s in (1, 2, 3, 4))
    weight = normal(40, seed=5)
    half = h.half()
    out = torch.empty(3, 40)
    residual_norm.forward(x, half, weight, weight, gate, 1e-5, out, module=module)
    torch.testing.assert_close(
        out, residual_norm_op.reference(x, half.float(), weight, weight, gate)
    )
    gradients = residual_norm.backward(grad, half, weight, weight, gate, 1e-5, module=module)
    assert [g.dtype for g in gradients] == [torch.float16] + 3 * [torch.float32]
    low = half.clone()  # in place, where weights alone are float32
    residual_norm.forward(low, half, weight, weight, None, 1e-5, low, module=module)
    expected = residual_norm_op.reference(half.float(), half.float(), weight, weight)
    torch.testing.assert_close(low, expected.half())
    result = scale_shift.forward(half, x, x, 1e-6, False, module=module)
    torch.testing.assert_close(result, scale_shift_op.reference(half.float(), x, x, 1e-6, False))
    gradients = scale_shift.backward(grad, half, x, 1e-6, False, module=module)
    assert [g.dtype for g in gradients] == [torch.float16, torch.float32]


@pytest.mark.parametrize("add_one", [True, False])
def test_scales_that_hold_the_one(add_one):
    x, scale, shift, grad = (normal((2, 24), torch.float16, seed) for seed in range(4))
    results = run_scale_shift(x, scale, shift, grad, add_one=add_one)
    check(
        results,
        lambda *t: scale_shift_op.reference(*t, add_one=add_one),
        (x, scale, shift),
        grad,
    )


@pytest.mark.parametrize("width", [40, 1300])
def test_the_order_of_threads_changes_nothing(width):
    given = [normal((5, width), torch.bfloat16, seed) for seed in range(4)]
    weight, bias = normal(width, torch.bfloat16, 5), normal(width, torch.bfloat16, 6)
    x, h, gate, grad = given
    first, *others = (
        run_scale_shift(*given, seed=seed) + run_residual_norm(x, h, weight, bias, gate, grad, seed)
        for seed in range(5)
    )
    for results in others:
        assert all(torch.equal(a, b) for a, b in zip(results, first, strict=True))


def test_no_rows():
    empty, weight = torch.empty(0, 24), normal(24)
    results = run_scale_shift(empty, empty, empty, empty)
    assert all(result.shape == (0, 24) for result in results)
    _, _, _, grad_weight, grad_bias = run_residual_norm(empty, empty, weight, weight, None, empty)
    assert torch.equal(grad_weight, torch.zeros(24)) and torch.equal(grad_bias, torch.zeros(24))


def test_what_the_kernels_do_not_take():
    double, wide = torch.zeros(2, 8, dtype=torch.float64), torch.zeros(1, 8193)
    with pytest.raises(BackendError, match="scale_shift: .*float64"):
        scale_shift.forward(double, double, double, 1e-6, True, module=emulator())
    with pytest.raises(BackendError, match="residual_norm: .*up to 8192"):
        residual_norm.forward(wide, wide, None, None, None, 1e-5, wide, module=emulator())
    elsewhere = torch.empty(2, 8, device="meta")
    with pytest.raises(BackendError, match="several devices"):
        scale_shift.backward(elsewhere, double.half(), double.half(), 1e-6, True, emulator())
