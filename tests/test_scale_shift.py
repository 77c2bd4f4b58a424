import pytest
import torch
from kernel_testing import (
    DTYPES,
    TRITON_AND_CUDA,
    assert_as_exact_as_torch,
    in_float64,
    opcheck,
    poisoned,
    randn,
)
from torch.nn import functional as F

from nova_kernels import BackendError, scale_shift
from nova_kernels.dispatch import Op
from nova_kernels.ops.scale_shift import EPS, reference

# Shape of x, and of scale and shift.
SHAPES = [
    ((1, 1), (1, 1)),
    ((3, 16), (3, 16)),
    ((7, 33), (33,)),
    ((2, 3, 64), (2, 1, 64)),
    ((2, 3, 5, 40), (3, 1, 40)),
    ((1, 4, 24), (3, 4, 24)),
    ((5, 192), (5, 192)),
    ((2, 1280), (2, 1280)),
    ((1, 1023), (1, 1023)),
]


def plain(x, scale, shift):
    """As people write it, in the input's dtype."""
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale) + shift


def inputs(x_shape, vector_shape, dtype):
    x = randn(*x_shape, dtype=dtype, seed=1) * 3 + 1
    scale, shift = (randn(*vector_shape, dtype=dtype, seed=k) for k in (2, 3))
    return [t.requires_grad_() for t in (x, scale, shift)]


def check(leaves, backend):
    """Result and gradients of x, scale and shift."""
    exact_leaves = in_float64(*leaves)
    exact, by_torch = reference(*exact_leaves), plain(*leaves)
    with poisoned():
        result = scale_shift(*leaves, backend=backend)
    assert_as_exact_as_torch(result, by_torch, exact)
    grad = randn(*result.shape, dtype=result.dtype, seed=4)
    with poisoned():
        gradients = torch.autograd.grad(result, leaves, grad)
    exact_gradients = torch.autograd.grad(exact, exact_leaves, grad.double())
    torch_gradients = torch.autograd.grad(by_torch, leaves, grad)
    for ours, theirs, right in zip(gradients, torch_gradients, exact_gradients, strict=True):
        if result.shape[-1] > 1 or right.norm() > 1e-12:
            assert_as_exact_as_torch(ours, theirs, right)


@pytest.mark.parametrize("backend", TRITON_AND_CUDA)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("x_shape, vector_shape", SHAPES)
def test_kernels_are_as_exact_as_torch(x_shape, vector_shape, dtype, backend):
    check(inputs(x_shape, vector_shape, dtype), backend)


@pytest.mark.parametrize("backend", TRITON_AND_CUDA)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e15, 1e-7, 1e-40])
def test_large_tiny_and_denormal_inputs(size, dtype, backend):
    """1e-7 is denormal in float16, 1e-40 in the other dtypes."""
    x, scale, shift = inputs((5, 192), (5, 192), dtype)
    fitting = min(size, torch.finfo(dtype).max / 20)
    check([(x.detach() * fitting).requires_grad_(), scale, shift], backend)


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_is_layer_norm_with_scale_and_shift(dtype):
    leaves = inputs((4, 96), (4, 96), dtype)
    exact = plain(*in_float64(*leaves))
    assert_as_exact_as_torch(scale_shift(*leaves), plain(*leaves), exact)


@pytest.mark.parametrize("backend", TRITON_AND_CUDA)
def test_strides_of_any_kind(backend):
    x = randn(6, 10, 48, seed=1).transpose(0, 1)[::2]
    scale = randn(5, 96, seed=2)[:, ::2][:, None]
    shift = randn(48, seed=3)
    with torch.no_grad():
        result = scale_shift(x, scale, shift, backend=backend)
    assert torch.allclose(result, reference(x, scale, shift), atol=1e-5)


@pytest.mark.parametrize("backend", TRITON_AND_CUDA)
def test_no_rows(backend):
    empty = randn(0, 32)
    assert scale_shift(empty, empty, empty, backend=backend).shape == (0, 32)


@pytest.mark.parametrize("backend", TRITON_AND_CUDA)
def test_operator_contract_and_compile(backend):
    leaves = inputs((3, 4, 40), (3, 1, 40), torch.float32)
    expanded = [t.detach().expand(3, 4, 40).requires_grad_() for t in leaves]
    arguments = (*expanded, EPS, True, backend)
    opcheck(torch.ops.nova_kernels.scale_shift.default, arguments)
    compiled = torch.compile(
        lambda *t: scale_shift(*t, backend=backend), fullgraph=True, backend="aot_eager"
    )
    result = compiled(*leaves)
    assert torch.allclose(result, reference(*leaves), atol=1e-5)
    result.sum().backward()
    assert all(leaf.grad is not None for leaf in leaves)
    with torch.inference_mode():
        assert torch.equal(scale_shift(*leaves, backend=backend), result)


@pytest.mark.parametrize(
    "x_shape, vector_shape, message",
    [
        ((), (), "last axis"),
        ((3, 0), (3, 0), "last axis"),
        ((3, 4), (3, 5), "one width"),
        ((3, 4), (3, 1), "one width"),
        ((3, 4), (2, 4), "do not broadcast"),
    ],
)
def test_shapes_that_do_not_fit(x_shape, vector_shape, message):
    with pytest.raises(ValueError, match=message):
        scale_shift(randn(*x_shape), randn(*vector_shape), randn(*vector_shape))


@pytest.mark.parametrize("backend", ["reference", *TRITON_AND_CUDA])
def test_several_dtypes_and_scales_that_hold_the_one(backend):
    x, scale, shift = inputs((5, 48), (5, 48), torch.float32)
    expected = reference(x, scale, shift)
    half = scale.detach().half().requires_grad_()
    result = scale_shift(x, half, shift, backend=backend)
    assert result.dtype == torch.float32 and torch.allclose(result, expected, atol=1e-2)
    assert torch.autograd.grad(result.sum(), half)[0].dtype == torch.float16
    result = scale_shift(x, 1 + scale, shift, add_one=False, backend=backend)
    assert torch.allclose(result, expected, atol=1e-5)
    gradients = torch.autograd.grad(result.sum(), (x, scale, shift))
    expected_gradients = torch.autograd.grad(expected.sum(), (x, scale, shift))
    for ours, right in zip(gradients, expected_gradients, strict=True):
        assert torch.allclose(ours, right, atol=1e-5)


def test_backends_that_do_not_fit():
    x = randn(2, 8)
    with pytest.raises(ValueError, match="backend must be one of"):
        scale_shift(x, x, x, backend="tritn")
    with pytest.raises(BackendError, match="not written"):
        Op("scale_shift").choose("cuda", x)
    with pytest.raises(BackendError, match="it needs tensors on a GPU"):
        scale_shift(*(t.cpu() for t in (x, x, x)), backend="cuda")


@pytest.mark.parametrize("backend", TRITON_AND_CUDA)
def test_rows_too_wide_for_a_kernel(backend):
    x = randn(1, 8193)
    with pytest.raises((ValueError, BackendError), match="up to 8192"), torch.no_grad():
        scale_shift(x, x, x, backend=backend)
