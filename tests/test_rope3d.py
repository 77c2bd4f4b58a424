import pytest
import torch
from kernel_testing import (
    DTYPES,
    assert_as_exact_as_torch,
    in_float64,
    needs_triton,
    opcheck,
    poisoned,
    randn,
)

from nova_kernels import rope3d
from nova_kernels.ops import rope3d as module
from nova_kernels.ops.rope3d import rotate_heads

# Batch, tokens, heads, head_dim, batch of the table.
SHAPES = [(1, 1, 1, 2, 1), (2, 5, 3, 32, 1), (3, 7, 2, 24, 3), (1, 3, 12, 64, 1), (2, 2, 1, 96, 2)]


def inputs(batch, tokens, heads, head_dim, table_batch, dtype=torch.float32):
    qkv = randn(batch, tokens, 3 * heads * head_dim, dtype=dtype, seed=1).requires_grad_()
    angles = randn(table_batch, tokens, head_dim // 2, seed=2) * 10
    return qkv, angles.cos(), angles.sin(), heads


def reference(qkv, cos, sin, heads):
    return module.reference(qkv.unflatten(-1, (3 * heads, -1)), cos, sin, 2 * heads).flatten(2)


def by_complex_numbers(qkv, cos, sin, heads):
    """The definition: a pair is a complex number, and turns by its angle."""
    parts = qkv.unflatten(-1, (3, heads, -1, 2))
    turned = torch.view_as_complex(parts[:, :, :2].contiguous())
    turned = turned * torch.complex(cos, sin)[:, :, None, None]
    return torch.cat([torch.view_as_real(turned), parts[:, :, 2:]], dim=2).flatten(2)


@pytest.mark.parametrize("shape", SHAPES)
def test_reference_turns_pairs(shape):
    qkv, cos, sin, heads = inputs(*shape)
    exact = [t.double() for t in (qkv, cos, sin)]
    assert torch.allclose(reference(*exact, heads), by_complex_numbers(*exact, heads))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@needs_triton
def test_triton_is_as_exact_as_torch(shape, dtype):
    qkv, cos, sin, heads = inputs(*shape, dtype=dtype)
    exact_qkv, *table = in_float64(qkv, cos, sin)
    exact, by_torch = reference(exact_qkv, *table, heads), reference(qkv, cos, sin, heads)
    with poisoned():
        result = rope3d(qkv, cos, sin, heads, backend="triton")
    assert_as_exact_as_torch(result, by_torch, exact)
    grad = randn(*qkv.shape, dtype=dtype, seed=4)
    with poisoned():
        (gradient,) = torch.autograd.grad(result, qkv, grad)
    (of_torch,) = torch.autograd.grad(by_torch, qkv, grad)
    (right,) = torch.autograd.grad(exact, exact_qkv, grad.double())
    assert_as_exact_as_torch(gradient, of_torch, right)


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=needs_triton)])
def test_in_place_and_strides(backend):
    qkv, cos, sin, heads = inputs(2, 6, 2, 8, 1)
    expected = reference(qkv, cos, sin, heads).detach()
    spread = torch.zeros(2, 6, 96, device=qkv.device)
    for target in (
        qkv.detach().clone(),
        qkv.detach().transpose(0, 1).contiguous().transpose(0, 1),
        spread[..., ::2].copy_(qkv.detach()),
    ):
        result = rope3d(target, cos, sin, heads, inplace=True, backend=backend)
        assert result is target and torch.allclose(target, expected, atol=1e-5)


@needs_triton
def test_operator_contract_and_compile():
    qkv, cos, sin, heads = inputs(2, 3, 2, 8, 1)
    packed = qkv.detach().unflatten(-1, (3 * heads, -1)).requires_grad_()
    opcheck(torch.ops.nova_kernels.rope3d.default, (packed, cos, sin, 2 * heads, False, "triton"))
    opcheck(torch.ops.nova_kernels.rope3d_.default, (packed.detach(), cos, sin, "triton"))
    compiled = torch.compile(
        lambda x: rope3d(x, cos, sin, heads, backend="triton"), fullgraph=True, backend="aot_eager"
    )
    result = compiled(qkv)
    assert torch.allclose(result, reference(qkv, cos, sin, heads), atol=1e-5)
    result.square().sum().backward()
    assert torch.allclose(qkv.grad, 2 * qkv, atol=1e-5)  # lengths do not change
    with torch.inference_mode():
        assert torch.equal(rope3d(qkv, cos, sin, heads, backend="triton"), result)


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=needs_triton)])
def test_rotated_heads_are_those_of_packed_qkv(backend):
    qkv, cos, sin, heads = inputs(3, 5, 2, 8, 3)
    q, k, _ = reference(qkv, cos, sin, heads).unflatten(-1, (3, heads, -1)).unbind(2)
    plain = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    for x, expected in zip(plain, (q, k), strict=False):
        rotated = rotate_heads(x, cos, sin, backend=backend)
        assert torch.allclose(rotated, expected.transpose(1, 2), atol=1e-5)


def test_arguments_that_do_not_fit():
    qkv, cos, sin, heads = inputs(2, 3, 2, 8, 1)
    with pytest.raises(ValueError, match="qkv must be"):
        rope3d(qkv[0], cos, sin, heads)
    with pytest.raises(ValueError, match="qkv must be"):
        rope3d(qkv, cos, sin, 5)
    with pytest.raises(ValueError, match="cos and sin"):
        rope3d(qkv, cos[:, :2], sin[:, :2], heads)
    with pytest.raises(ValueError, match="inplace"):
        rope3d(qkv, cos, sin, heads, inplace=True)
