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

from nova_kernels import residual_norm
from nova_kernels.ops.residual_norm import EPS, reference
from nova_kernels.rows import as_rows

# Shape of x and h, and of the gate.
SHAPES = [
    ((1, 1), None),
    ((3, 16), (3, 16)),
    ((7, 33), None),
    ((2, 3, 64), (2, 1, 64)),
    ((5, 192), (192,)),
    ((2, 1024), None),
    ((2, 1280), (2, 1280)),
    ((1, 1023), None),
    ((517, 70), None),  # three strips of the backward pass
]


def plain(x, h, weight, bias, gate):
    """As people write it, in the input's dtype."""
    branch = F.layer_norm(h, h.shape[-1:], weight, bias, EPS)
    return x + (branch if gate is None else gate * branch)


def inputs(shape, gate_shape, affine, dtype):
    def leaf(shape, seed):
        return randn(*shape, dtype=dtype, seed=seed).requires_grad_()

    x, h = leaf(shape, 1), leaf(shape, 2)
    weight, bias = (leaf(shape[-1:], 3), leaf(shape[-1:], 4)) if affine else (None, None)
    return x, h, weight, bias, None if gate_shape is None else leaf(gate_shape, 5)


def run(backend, x, h, weight, bias, gate, **options):
    return residual_norm(x, h, weight, bias, gate=gate, backend=backend, **options)


def check(given, backend):
    """Result and gradients of what is given."""
    exact_given = in_float64(*given)
    exact, by_torch = reference(*exact_given), plain(*given)
    with poisoned():
        result = run(backend, *given)
    assert_as_exact_as_torch(result, by_torch, exact)

    leaves, exact_leaves = ([t for t in ts if t is not None] for ts in (given, exact_given))
    grad = randn(*result.shape, dtype=result.dtype, seed=6)
    with poisoned():
        gradients = torch.autograd.grad(result, leaves, grad)
    exact_gradients = torch.autograd.grad(exact, exact_leaves, grad.double())
    torch_gradients = torch.autograd.grad(by_torch, leaves, grad)
    for ours, theirs, right in zip(gradients, torch_gradients, exact_gradients, strict=True):
        if right.norm() > 1e-12:  # a norm of one value has no gradient
            assert_as_exact_as_torch(ours, theirs, right)


@pytest.mark.parametrize("backend", TRITON_AND_CUDA)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape, gate_shape", SHAPES)
def test_kernels_are_as_exact_as_torch(shape, gate_shape, affine, dtype, backend):
    check(inputs(shape, gate_shape, affine, dtype), backend)


@pytest.mark.parametrize("backend", TRITON_AND_CUDA)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e15, 1e-7, 1e-40])
def test_large_tiny_and_denormal_branches(size, dtype, backend):
    """1e-7 is denormal in float16, 1e-40 in the other dtypes."""
    x, h, *others = inputs((5, 192), (5, 192), True, dtype)
    fitting = min(size, torch.finfo(dtype).max / 20)
    check((x, (h.detach() * fitting).requires_grad_(), *others), backend)


@pytest.mark.parametrize("backend", ["reference", *TRITON_AND_CUDA])
def test_several_dtypes(backend):
    """As automatic mixed precision has them: a branch in half precision on a float32 residual."""
    x, h, weight, bias, gate = inputs((5, 48), (5, 48), True, torch.float32)
    half = h.detach().half().requires_grad_()
    result = residual_norm(x, half, weight, bias, gate=gate, backend=backend)
    expected = reference(x, half.float(), weight, bias, gate)
    # Plain torch rounds the norm to the branch's dtype; kernels round nothing but the branch.
    tolerance = 1e-2 if backend == "reference" else 1e-5
    assert result.dtype == torch.float32
    assert torch.allclose(result, expected, atol=tolerance, rtol=tolerance)
    leaves = (x, half, weight, bias, gate)
    gradients = torch.autograd.grad(result.sum(), leaves)
    assert [g.dtype for g in gradients] == [t.dtype for t in leaves]
    low = residual_norm(half.detach(), half, weight, bias, backend=backend)
    assert low.dtype == torch.float16


def test_the_reference_normalizes_in_one_dtype(monkeypatch):
    """As torch's kernel for GPUs asks for."""
    x, h, weight, bias, gate = inputs((5, 48), (5, 48), True, torch.float32)
    expected, layer_norm, seen = reference(x, h.half(), weight, bias, gate), F.layer_norm, []

    def spy(h, shape, weight, bias, eps):
        seen.append({h.dtype, weight.dtype, bias.dtype})
        return layer_norm(h, shape, weight, bias, eps)

    monkeypatch.setattr(F, "layer_norm", spy)
    assert torch.equal(reference(x, h.half(), weight, bias, gate), expected)
    assert reference(h.half(), h.half(), weight.half(), bias.half()).dtype == torch.float16
    assert seen == [{torch.float32}, {torch.float16}]


@pytest.mark.parametrize("backend", TRITON_AND_CUDA)
def test_a_residual_shared_by_several_passes(backend):
    x, h, gate = randn(1, 4, 24, seed=1), randn(3, 4, 24, seed=2), randn(3, 4, 24, seed=3)
    result = residual_norm(x, h, gate=gate, backend=backend)
    assert torch.allclose(result, reference(x, h, gate=gate), atol=1e-5)


@pytest.mark.parametrize("backend", TRITON_AND_CUDA)
def test_in_place(backend):
    x, h, weight, bias, gate = (
        None if t is None else t.detach() for t in inputs((4, 6, 40), (40,), True, torch.float32)
    )
    expected = reference(x, h, weight, bias, gate)
    for view in (x.clone(), x.clone().transpose(0, 1).contiguous().transpose(0, 1)):
        for chosen in (backend, "reference"):
            target = view.clone(memory_format=torch.preserve_format)
            options = {"gate": gate, "inplace": True, "backend": chosen}
            result = residual_norm(target, h, weight, bias, **options)
            assert result is target and torch.allclose(target, expected, atol=1e-5)


@pytest.mark.parametrize("backend", TRITON_AND_CUDA)
def test_in_place_of_what_other_inputs_are_parts_of(backend):
    """Rows are written while others are read."""

    def results(chosen):
        options = {"inplace": True, "backend": chosen}
        yield residual_norm((x := randn(40, 16)), randn(40, 16, seed=1), gate=x[5:6], **options)
        yield residual_norm((x := randn(41, 16))[1:], x[:-1], **options)
        yield residual_norm((x := randn(40, 16)), randn(40, 16, seed=1), x[3], x[4], **options)
        yield residual_norm((x := randn(40, 16)), x, **options)

    for result, expected in zip(results(backend), results("reference"), strict=True):
        assert torch.allclose(result, expected, atol=1e-5)


@pytest.mark.parametrize("backend", TRITON_AND_CUDA)
def test_in_place_where_strides_do_not_merge(backend):
    """x is then copied for the kernel, and the result has to come back."""
    base = randn(3, 4, 5, 32, seed=1)
    x, h = base[::2, ::2, ::2], randn(2, 2, 3, 32, seed=2)
    assert as_rows(x).tensors[0] is not x  # a copy
    expected, others = reference(x, h), base[1].clone()
    assert torch.allclose(run(backend, x, h, None, None, None, inplace=True), expected, atol=1e-5)
    assert torch.allclose(base[::2, ::2, ::2], expected, atol=1e-5)
    assert torch.equal(base[1], others)


@pytest.mark.parametrize("backend", TRITON_AND_CUDA)
def test_operator_contract_and_compile(backend):
    given = inputs((3, 4, 40), (3, 4, 40), True, torch.float32)
    arguments = (*given, EPS, backend)
    opcheck(torch.ops.nova_kernels.residual_norm.default, arguments)
    detached = (*(t.detach() for t in given), EPS, backend)
    opcheck(torch.ops.nova_kernels.residual_norm_.default, detached)
    compiled = torch.compile(lambda *t: run(backend, *t), fullgraph=True, backend="aot_eager")
    result = compiled(*given)
    assert torch.allclose(result, reference(*given), atol=1e-5)
    result.sum().backward()
    assert all(leaf.grad is not None for leaf in given)
    with torch.inference_mode():
        assert torch.equal(run(backend, *given), result)


def test_arguments_that_do_not_fit():
    x, width = randn(2, 8), randn(8)
    with pytest.raises(ValueError, match="one width"):
        residual_norm(x, randn(2, 9))
    with pytest.raises(ValueError, match=r"\(3, 2, 8\) does not fit in place of \(2, 8\)"):
        residual_norm(x, randn(3, 2, 8), inplace=True)
    with pytest.raises(ValueError, match="weight and bias"):
        residual_norm(x, x, width)
    with pytest.raises(ValueError, match="bias must be"):
        residual_norm(x, x, width, randn(7))
    with pytest.raises(ValueError, match="do not broadcast"):
        residual_norm(x, x, gate=randn(3, 8))
    with pytest.raises(ValueError, match="inplace"):
        residual_norm(x, x.clone().requires_grad_(), inplace=True)
