import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
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
from torch import nn
from torch.nn import functional as F

from nova.layers import Mlp
from nova_kernels import BackendError, linear_gelu
from nova_kernels.ops.linear_gelu import reference

# Rows, inputs, outputs: no values, less than a block of 2048, a block, its rim, several.
SIZES = [
    ((1,), 1, 1),
    ((3, 5), 16, 33),
    ((2, 0), 8, 16),
    ((32,), 100, 64),
    ((23,), 8, 89),
    ((3, 683), 4, 1),
    ((130,), 64, 260),
]


def inputs(rows, width, outputs, dtype=torch.float32):
    x, weight = randn(*rows, width, dtype=dtype), randn(outputs, width, dtype=dtype, seed=1)
    weight, bias = weight * width**-0.5, randn(outputs, dtype=dtype, seed=2)
    return [leaf.requires_grad_() for leaf in (x, weight, bias)]


def assert_right(leaves, dtype):
    """Result and gradients, the latter with what GELU is applied to stored on the way."""
    exact_leaves = in_float64(*leaves)
    exact, by_torch = reference(*exact_leaves), reference(*leaves)
    with poisoned():
        with torch.no_grad():
            alone = linear_gelu(*leaves, backend="triton")
        result = linear_gelu(*leaves, backend="triton")
        grad = randn(*result.shape, dtype=dtype, seed=9)
        gradients = torch.autograd.grad(result, leaves, grad)
    assert_as_exact_as_torch(alone, by_torch, exact)
    assert_as_exact_as_torch(result, by_torch, exact)
    exact_gradients = torch.autograd.grad(exact, exact_leaves, grad.double())
    torch_gradients = torch.autograd.grad(by_torch, leaves, grad)
    for ours, theirs, right in zip(gradients, torch_gradients, exact_gradients, strict=True):
        assert_as_exact_as_torch(ours, theirs, right)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
@needs_triton
def test_triton_is_as_exact_as_torch(sizes, dtype):
    assert_right(inputs(*sizes, dtype=dtype), dtype)


@given(st.integers(1, 140), st.integers(1, 70), st.integers(1, 140))
@settings(max_examples=10, deadline=None)
@needs_triton
def test_any_size(rows, width, outputs):
    assert_right(inputs((rows,), width, outputs, torch.float16), torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [192, 1024])
@needs_triton
def test_real_widths(width, dtype):
    assert_right(inputs((3,), width, 4 * width, dtype), dtype)


def gelu_by_triton(x):
    from nova_kernels.triton_kernels.linear_gelu import plan

    out = torch.full_like(x, torch.nan)
    plan(x, out).run()
    return out


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.float32])
@needs_triton
def test_every_value_in_half_precision(dtype):
    """Rounded once, from a value with a small relative error, far on the negative side too."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).to(DEVICE)
    result, plain = gelu_by_triton(x), F.gelu(x.double())
    torch.testing.assert_close(result.isnan(), plain.isnan())
    x, result = x[x.isfinite()], result[x.isfinite()].double()
    exact = x.double() * torch.special.log_ndtr(x.double()).exp()
    info = torch.finfo(dtype)
    # Half of what the last place is worth; and what leaves the dtype, or float32, is 0.
    allowed = (info.eps / 2 + 5e-5) * exact.abs() + max(info.smallest_normal * info.eps, 2e-37)
    assert ((result - exact).abs() <= allowed).all()
    assert (result.signbit() == x.signbit()).all()


@pytest.mark.parametrize("dtype", DTYPES)
@needs_triton
def test_extreme_values(dtype):
    info = torch.finfo(dtype)
    values = [torch.inf, torch.nan, info.max, 1e4, 14.0, 6.0, info.tiny, info.tiny / 8, 0.0]
    x = torch.tensor([*values, *(-value for value in values)], dtype=dtype, device=DEVICE)
    expected = F.gelu(x.double()).to(dtype)
    close = {"rtol": info.eps, "atol": 4e-7, "equal_nan": True}
    torch.testing.assert_close(gelu_by_triton(x), expected, **close)


@pytest.mark.parametrize("dtype", DTYPES)
@needs_triton
def test_in_place_is_the_product_alone(dtype):
    tensors = [leaf.detach() for leaf in inputs((5,), 24, 40, dtype)]
    copies = [tensor.clone() for tensor in tensors]
    operator = torch.ops.nova_kernels.linear_gelu
    in_place, nothing = operator(*tensors, False, "triton")
    apart, hidden = operator(*tensors, True, "triton")
    assert torch.equal(in_place, apart) and nothing.numel() == 0
    assert torch.equal(hidden, F.linear(*tensors))
    assert all(torch.equal(*pair) for pair in zip(tensors, copies, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [8, 720, 3601])
def test_real_sizes(rows, dtype):
    assert_right(inputs((rows,), 1024, 4096, dtype), dtype)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_strided_inputs(dtype):
    x = randn(6, 2, 40, dtype=dtype).transpose(0, 1)[:, 1:]  # rows that are not neighbours
    weight, bias = randn(40, 64, dtype=dtype, seed=1).t() * 0.1, randn(64, 2, dtype=dtype)[:, 1]
    columns = randn(40, 10, dtype=dtype).t()  # neighbours in a row are far apart
    for tensors in ((x, weight, bias), (columns, weight, bias)):
        exact = reference(*in_float64(*tensors))
        result = linear_gelu(*tensors, backend="triton")
        assert_as_exact_as_torch(result, reference(*tensors), exact)


@needs_triton
def test_large_values_and_nan():
    x, weight, bias = (leaf.detach() for leaf in inputs((4,), 16, 32))
    x[0] *= 1e4
    x[1, 3] = float("nan")
    result = linear_gelu(x, weight, bias, backend="triton")
    torch.testing.assert_close(result, reference(x, weight, bias), equal_nan=True)
    assert result[1].isnan().all() and not result[[0, 2, 3]].isnan().any()


@needs_triton
def test_operator_contract_and_compile():
    leaves = inputs((2, 3), 24, 40)
    for keep_hidden in (True, False):
        given = leaves if keep_hidden else [leaf.detach() for leaf in leaves]
        opcheck(torch.ops.nova_kernels.linear_gelu.default, (*given, keep_hidden, "triton"))
    compiled = torch.compile(
        lambda *t: linear_gelu(*t, backend="triton"), fullgraph=True, backend="aot_eager"
    )
    result = compiled(*leaves)
    assert torch.allclose(result, reference(*leaves), atol=1e-5)
    result.sum().backward()
    assert all(leaf.grad is not None for leaf in leaves)
    with torch.inference_mode():
        assert torch.allclose(compiled(*leaves), result, atol=1e-6)
        assert torch.allclose(linear_gelu(*leaves, backend="triton"), result, atol=1e-6)


@needs_triton
def test_autocast_computes_in_its_dtype():
    leaves = inputs((5,), 32, 48)
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float16
    with torch.autocast(DEVICE, dtype=dtype):
        result = linear_gelu(*leaves, backend="triton")
        expected = linear_gelu(*leaves, backend="reference")
    assert result.dtype == expected.dtype == dtype
    torch.testing.assert_close(result, expected, atol=2e-2, rtol=2e-2)
    result.sum().backward()
    assert all(leaf.grad.dtype == torch.float32 for leaf in leaves)


class Adapter(nn.Linear):
    """A layer put in the place of another."""

    def forward(self, x):
        return super().forward(x) + 1


@needs_triton
def test_no_second_derivative():
    leaves = inputs((3,), 8, 4)
    result = linear_gelu(*leaves, backend="triton")
    gradients = torch.autograd.grad(result.square().sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradients[0].sum().backward()


@needs_triton
def test_the_mlp_runs_it_and_calls_layers_put_in_its_place():
    mlp, x = Mlp(32, 128).to(DEVICE), randn(3, 32)
    expected = mlp(x)
    mlp.backend = "triton"
    torch.testing.assert_close(mlp(x), expected)
    calls = []
    hook = mlp.fc1.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(mlp(x), expected)
    assert calls == [1]
    hook.remove()
    adapter = Adapter(32, 128).to(DEVICE)
    adapter.load_state_dict(mlp.fc1.state_dict())
    hidden = F.gelu(mlp.fc1(x) + 1)
    mlp.fc1 = adapter
    torch.testing.assert_close(mlp(x), mlp.fc2(hidden))


def test_the_mlp_makes_gelu_in_place_where_nobody_sees_it():
    mlp, x = Mlp(32, 128).to(DEVICE), randn(3, 32)
    expected, before = mlp(x), x.clone()
    with torch.no_grad():
        assert torch.equal(mlp(x), expected) and torch.equal(x, before)
        seen = []
        mlp.fc1.register_forward_hook(lambda layer, given, output: seen.append(output))
        assert torch.equal(mlp(x), expected)
        assert torch.equal(seen[0], F.linear(x, mlp.fc1.weight, mlp.fc1.bias))
    mlp(x).sum().backward()
    assert mlp.fc1.weight.grad is not None


@needs_triton
def test_what_does_not_fit():
    x, weight, bias = (leaf.detach() for leaf in inputs((2,), 8, 4))
    with pytest.raises(ValueError, match="weight"):
        linear_gelu(x[:, :7], weight, bias)
    with pytest.raises(ValueError, match="bias must be"):
        linear_gelu(x, weight, bias[:3])
    with pytest.raises(BackendError, match="one dtype"):
        linear_gelu(x, weight.half(), bias, backend="triton")
    with pytest.raises(BackendError, match="float64.*backend='reference'"):
        linear_gelu(x.double(), weight.double(), bias.double(), backend="triton")


@needs_triton
def test_a_single_row_without_other_axes():
    x, *others = inputs((1,), 8, 4)
    row = x[0].detach().requires_grad_()
    result = linear_gelu(row, *others, backend="triton")
    exact = reference(row, *others)
    torch.testing.assert_close(result, exact)
    grad = torch.autograd.grad(result.sum(), row)[0]
    torch.testing.assert_close(grad, torch.autograd.grad(exact.sum(), row)[0])
