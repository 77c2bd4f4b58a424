import pytest
import torch
from kernel_testing import (
    DEVICE,
    DTYPES,
    assert_as_exact_as_torch,
    in_float64,
    needs_triton,
    opcheck,
    poisoned,
    randn,
)
from torch.nn import functional as F

from nova_kernels import BackendError, frame_scale_shift
from nova_kernels.ops.frame_scale_shift import MAX_RANK, reference

# Shapes of first and current, rank.
SHAPES = [
    ((1, 1), (1, 1), 1),
    ((5, 16), (5, 16), 16),
    ((2, 1, 3, 40), (2, 4, 3, 40), 5),
    ((2, 33, 64), (2, 33, 64), 24),
    ((70, 100), (70, 100), 128),
    ((3, 192), (3, 192), 33),
    ((2, 192), (2, 192), 128),  # of the model in this package
    ((1, 2, 1024), (2, 2, 1024), 24),  # of the 0.6B text-to-video model
]


def plain(first, current, down, up, bias):
    """As people write it, in the input's dtype."""
    scale, shift = F.linear(F.linear(F.silu(current), down), up, bias).chunk(2, dim=-1)
    return first * (1 + scale) + shift


def inputs(first_shape, current_shape, rank, dtype=torch.float32):
    width = current_shape[-1]
    shapes = (first_shape, current_shape, (rank, width), (2 * width, rank), (2 * width,))
    sizes = (1, 1, width**-0.5, rank**-0.5, 0.1)
    leaves = [
        randn(*shape, dtype=dtype, seed=seed) * size
        for seed, (shape, size) in enumerate(zip(shapes, sizes, strict=True))
    ]
    return [leaf.requires_grad_() for leaf in leaves]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shapes", SHAPES)
@needs_triton
def test_triton_is_as_exact_as_torch(shapes, dtype):
    leaves = inputs(*shapes, dtype=dtype)
    exact_leaves = in_float64(*leaves)
    exact, by_torch = reference(*exact_leaves), plain(*leaves)
    with poisoned():
        result = frame_scale_shift(*leaves, backend="triton")
    assert_as_exact_as_torch(result, by_torch, exact)
    grad = randn(*result.shape, dtype=dtype, seed=9)
    with poisoned():
        gradients = torch.autograd.grad(result, leaves, grad)
    exact_gradients = torch.autograd.grad(exact, exact_leaves, grad.double())
    torch_gradients = torch.autograd.grad(by_torch, leaves, grad)
    for ours, theirs, right in zip(gradients, torch_gradients, exact_gradients, strict=True):
        assert_as_exact_as_torch(ours, theirs, right)


@needs_triton
def test_features_of_frame_0_in_another_dtype():
    first, *others = inputs((3, 40), (3, 40), 5)
    halves = [tensor.detach().half().requires_grad_() for tensor in others]
    result = frame_scale_shift(first, *halves, backend="triton")
    expected = frame_scale_shift(first, *others)
    assert result.dtype == torch.float32 and torch.allclose(result, expected, atol=1e-2)
    gradients = torch.autograd.grad(result.sum(), [first, *halves])
    right = torch.autograd.grad(expected.sum(), [first, *others])
    for ours, exact, leaf in zip(gradients, right, [first, *halves], strict=True):
        assert ours.dtype == leaf.dtype and torch.allclose(ours.float(), exact, atol=2e-2)


@pytest.mark.parametrize("of_features", [torch.float32, torch.float16])
@needs_triton
def test_autocast_computes_in_its_dtype(of_features):
    leaves = inputs((1, 3, 40), (2, 3, 40), 5)
    features = [leaf.detach().to(of_features).requires_grad_() for leaf in leaves[:2]]
    leaves = [*features, *leaves[2:]]
    with torch.autocast(DEVICE, dtype=torch.float16):
        result = frame_scale_shift(*leaves, backend="triton")
        expected = frame_scale_shift(*leaves, backend="reference")
    assert result.dtype == expected.dtype == of_features
    torch.testing.assert_close(result, expected, atol=1e-2, rtol=1e-2)
    gradients = torch.autograd.grad(result.float().sum(), leaves)
    right = torch.autograd.grad(expected.float().sum(), leaves)
    for ours, exact, leaf in zip(gradients, right, leaves, strict=True):
        assert ours.dtype == leaf.dtype
        torch.testing.assert_close(ours, exact, atol=2e-2, rtol=2e-2)


@needs_triton
def test_no_second_derivative():
    leaves = inputs((3, 8), (3, 8), 4)
    result = frame_scale_shift(*leaves, backend="triton")
    gradients = torch.autograd.grad(result.square().sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradients[0].sum().backward()


@pytest.mark.parametrize("shapes", SHAPES)
def test_reference_is_the_layer(shapes):
    leaves = in_float64(*inputs(*shapes))
    assert torch.allclose(frame_scale_shift(*leaves), plain(*leaves))


@needs_triton
def test_operator_contract_and_compile():
    leaves = inputs((2, 1, 3, 40), (2, 2, 3, 40), 5)
    first = leaves[0].detach().expand_as(leaves[1]).requires_grad_()
    arguments = (first, *leaves[1:], "triton")
    opcheck(torch.ops.nova_kernels.frame_scale_shift.default, arguments)
    compiled = torch.compile(
        lambda *t: frame_scale_shift(*t, backend="triton"), fullgraph=True, backend="aot_eager"
    )
    result = compiled(*leaves)
    assert torch.allclose(result, reference(*leaves), atol=1e-5)
    result.sum().backward()
    assert all(leaf.grad is not None for leaf in leaves)
    with torch.inference_mode():
        assert torch.equal(frame_scale_shift(*leaves, backend="triton"), result)


@needs_triton
def test_what_the_kernel_does_not_take():
    leaves = inputs((2, 8), (2, 8), MAX_RANK + 1)
    with pytest.raises(BackendError, match="ranks up to"), torch.no_grad():
        frame_scale_shift(*leaves, backend="triton")
    *others, bias = inputs((2, 8), (2, 8), 4)
    with pytest.raises(BackendError, match="one dtype"), torch.no_grad():
        frame_scale_shift(*others, bias.half(), backend="triton")
    with pytest.raises(BackendError, match="float64.*backend='reference'"), torch.no_grad():
        frame_scale_shift(*in_float64(*others, bias), backend="triton")
    assert torch.allclose(frame_scale_shift(*leaves), reference(*leaves))


def test_arguments_that_do_not_fit():
    first, current, down, up, bias = inputs((2, 8), (2, 8), 4)
    with pytest.raises(ValueError, match="down must be"):
        frame_scale_shift(first, current, down[:, :7], up, bias)
    with pytest.raises(ValueError, match="bias must be"):
        frame_scale_shift(first, current, down, up, bias[:8])
    with pytest.raises(ValueError, match="one width"):
        frame_scale_shift(first[:, :4], current, down, up, bias)
