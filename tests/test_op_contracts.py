"""What all ops promise beside their results: autograd is told, odd inputs work or are refused."""

import pytest
import torch
from kernel_testing import DEVICE, TRITON_AND_CUDA, needs_triton, randn

import nova_kernels
from nova_kernels import residual_norm, rope3d, scale_shift
from nova_kernels.dispatch import Op
from nova_kernels.ops.rope3d import rotate_heads
from nova_kernels.self_check import largest_error, self_checks

BACKENDS = ["reference", *TRITON_AND_CUDA]


def table(tokens, pairs):
    angles = randn(1, tokens, pairs)
    return angles.cos(), angles.sin()


# In place -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("through_operator", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_autograd_notices_what_is_written_in_place(backend, through_operator):
    x, h, w = randn(4, 16), randn(4, 16), randn(4, 16).requires_grad_()
    product = (x * w).sum()
    if through_operator and backend != "reference":
        arguments = (h, None, None, None, 1e-5, backend)
        torch.ops.nova_kernels.residual_norm_(x, *arguments)
    else:
        with torch.no_grad():
            residual_norm(x, h, inplace=True, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=needs_triton)])
def test_autograd_notices_what_is_rotated_in_place(backend):
    qkv, w = randn(1, 3, 3 * 8), randn(1, 3, 3 * 8).requires_grad_()
    product = (qkv * w).sum()
    rope3d(qkv, *table(3, 4), 1, inplace=True, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_place_in_inference_mode(backend):
    with torch.inference_mode():
        x, h = randn(4, 16), randn(4, 16)
        expected = residual_norm(x, h, backend="reference")
        residual_norm(x, h, inplace=True, backend=backend)
        torch.testing.assert_close(x, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_place_where_elements_share_a_place(backend):
    x = randn(1, 16).expand(4, 16)
    with pytest.raises(ValueError, match="several elements of x lie in one place"):
        residual_norm(x, randn(4, 16), inplace=True, backend=backend)
    if backend != "cuda":
        qkv = randn(1, 1, 24).expand(1, 3, 24)
        with pytest.raises(ValueError, match="several elements of qkv lie in one place"):
            rope3d(qkv, *table(3, 4), 1, inplace=True, backend=backend)


# Odd inputs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend):
    """Of leading axes that do not act as one."""
    x, others = randn(1, 2, 0, 16).requires_grad_(), randn(3, 2, 0, 16)
    for result in (
        scale_shift(x, others, others, backend=backend),
        residual_norm(x, others, backend=backend),
    ):
        assert result.shape == (3, 2, 0, 16)
        result.sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_integers_are_refused(backend):
    x = torch.ones(2, 16, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="x must have a floating dtype, got torch.int32"):
        scale_shift(x, x, x, backend=backend)


@pytest.mark.parametrize("backend", TRITON_AND_CUDA)
def test_what_kernels_do_not_take(backend):
    x, wide = randn(2, 16), torch.empty(1, 8200, device=DEVICE)
    for message, tensors in (
        ("some are float64; use backend='reference'", [x.double()] * 3),
        ("widths up to 8192; use backend='reference'", [wide] * 3),
        ("call resolve_neg", [torch._neg_view(x)] * 3),
    ):
        with pytest.raises(nova_kernels.BackendError, match=message):
            scale_shift(*tensors, backend=backend)


@needs_triton
def test_what_kernels_do_not_take_runs_by_torch_if_nobody_is_named():
    op = Op("scale_shift", verified=frozenset({"triton"}), max_width=8192)
    x, wide = randn(2, 16), torch.empty(1, 8200, device=DEVICE)
    chosen = [op.choose("auto", tensor) for tensor in (x, x.double(), wide)]
    assert chosen == ["triton", "reference", "reference"]


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=needs_triton)])
def test_heads_that_cannot_be_rotated(backend):
    with pytest.raises(ValueError, match="an even head_dim"):
        rotate_heads(randn(1, 3, 3, 5), *table(3, 2), backend=backend)
    cos, sin = table(3, 4)
    with pytest.raises(ValueError, match="have no gradient; detach"):
        rope3d(randn(1, 3, 24), cos.requires_grad_(), sin, 1, backend=backend)


# Second derivatives -------------------------------------------------------------------------------


@needs_triton
@pytest.mark.parametrize("case", list(self_checks()), ids=lambda case: case.op.name)
def test_a_second_derivative_is_right_or_refused(case):
    if not case.has_gradient:
        pytest.skip("an op for sampling")

    def second(backend):
        inputs = [t.to(DEVICE, torch.float32).requires_grad_() for t in case.inputs]
        result = case.run(backend, *inputs)
        gradients = torch.autograd.grad(result.square().sum(), inputs, create_graph=True)
        total = sum(gradient.square().sum() for gradient in gradients)
        return torch.autograd.grad(total, inputs)

    if case.op.name == "rope3d":  # its gradient is itself
        torch.testing.assert_close(second("triton"), second("reference"), rtol=1e-4, atol=1e-4)
        return
    with pytest.raises(RuntimeError, match="there is no second derivative"):
        second("triton")


# CUDA graphs --------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("backend", TRITON_AND_CUDA)
@pytest.mark.parametrize("case", list(self_checks()), ids=lambda case: case.op.name)
def test_ops_in_cuda_graphs(case, backend):
    """A replay computes with what the inputs hold then."""
    if backend not in case.op.implementations:
        pytest.skip("not written for this op")
    assert largest_error(case, backend, "cuda", torch.float16) < 1e-2  # compiles it too
    inputs = [t.to("cuda", torch.float16) for t in case.inputs]
    with torch.no_grad():
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            case.run(backend, *inputs)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            result = case.run(backend, *inputs)
        for tensor in inputs:
            tensor.mul_(0.5)
        graph.replay()
        torch.testing.assert_close(result, case.run(backend, *inputs), rtol=0, atol=0)
