"""What all ops promise beside their results: autograd is told, odd inputs work or are refused."""

import pytest
import torch
from cuda_emulation import emulated_extension, needs_compiler
from kernel_testing import DEVICE, TRITON_AND_CUDA, needs_triton, randn
from test_denoise import inputs, numbers
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import nova_kernels
from nova.graph_recording import CUDARecorder
from nova_kernels import HeadWeights, denoise, residual_norm, rope3d, scale_shift
from nova_kernels.cuda_kernels.denoise_plan import (
    DenoiseShape,
    DeviceLimits,
    obstacle_of_memory,
)
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


# What looks on ------------------------------------------------------------------------------------


@needs_triton
def test_fake_tensors_and_traces():
    x, h = randn(4, 16), randn(4, 16, seed=1)

    def both(x):
        return scale_shift(x, h, h, backend="triton"), residual_norm(x, h, backend="triton")

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert [result.shape for result in both(mode.from_tensor(x))] == [(4, 16), (4, 16)]
    traced = make_fx(both)(x)
    for result, expected in zip(traced(2 * x), both(2 * x), strict=True):
        assert torch.equal(result, expected)


@needs_triton
def test_kernels_have_no_forward_mode(monkeypatch):
    op = Op("scale_shift", verified=frozenset({"triton"}))
    monkeypatch.setattr(Op, "verified_on", lambda self, device: self.verified)
    x = randn(4, 16)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        assert op.choose("auto", x) == "triton" and op.choose("auto", x, dual) == "reference"
        with pytest.raises(nova_kernels.BackendError, match="no derivative in forward mode"):
            scale_shift(dual, x, x, backend="triton")


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
def test_what_kernels_do_not_take_runs_by_torch_if_nobody_is_named(monkeypatch):
    op = Op("scale_shift", verified=frozenset({"triton"}), max_width=8192)
    monkeypatch.setattr(Op, "verified_on", lambda self, device: self.verified)
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


REFERENCE_AND_TRITON = ["reference", pytest.param("triton", marks=needs_triton)]


@pytest.mark.parametrize("backend", ["auto", *REFERENCE_AND_TRITON])
def test_dtypes_that_the_products_of_denoise_do_not_take(backend):
    x, condition, times, weights = inputs((1, 3), 2, 2, depth=1, width=32)
    low = torch.bfloat16
    tensors = weights.tensors()

    def refused(message, x=x, condition=condition, times=times, tensors=tensors):
        mlp = HeadWeights.of_tensors(tensors, depth=1)
        with pytest.raises(ValueError, match=f"^denoise: {message}"), torch.no_grad():
            denoise(x, condition, times, mlp, numbers(2), backend=backend)

    of_sum = "the sum of condition and time_embeddings must be torch.float32 as x, got torch."
    refused(
        of_sum + "bfloat16 and torch.bfloat16", condition=condition.to(low), times=times.to(low)
    )
    refused("weights must be torch.bfloat16 as x, got .'torch.float32'.", x=x.to(low))
    for k, tensor in enumerate(tensors):
        changed = [*tensors[:k], tensor.to(low), *tensors[k + 1 :]]
        refused("weights must be torch.float32 as x, got .'torch.bfloat16'.", tensors=changed)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("backend", ["auto", *REFERENCE_AND_TRITON])
def test_denoise_with_a_condition_or_times_of_a_lower_dtype(backend, compiled):
    x, condition, times, weights = inputs((1, 3), 2, 2, depth=1, width=32)

    def call(condition, times):
        with torch.no_grad():
            return denoise(x, condition, times, weights, numbers(2), backend=backend)

    torch.compiler.reset()
    function = torch.compile(call, fullgraph=True, backend="aot_eager") if compiled else call
    for given in ((condition.bfloat16(), times), (condition, times.bfloat16())):
        expected = call(*(tensor.float() for tensor in given))
        torch.testing.assert_close(function(*given), expected)


@needs_compiler
@pytest.mark.parametrize(
    "op, struct",
    [
        ("scale_shift", "ScaleShiftArguments"),
        ("scale_shift_backward", "ScaleShiftBackwardArguments"),
        ("residual_norm", "ResidualNormArguments"),
        ("residual_norm_backward", "ResidualNormBackwardArguments"),
    ],
)
def test_launches_of_rows_name_the_op_that_refuses(op, struct):
    module = emulated_extension()
    arguments = getattr(module, struct)()
    arguments.num_rows, arguments.width = 1, 8193
    with pytest.raises(ValueError, match=f"^{op}: width must be 1 to 8192, got 8193"):
        getattr(module, op)(arguments, 0)
    arguments.num_rows, arguments.width = 0, 8
    with pytest.raises(
        ValueError, match=f"^{op}: num_rows, inner and strip must .* got 0, 1 and 1"
    ):
        getattr(module, op)(arguments, 0)


@needs_compiler
def test_arguments_of_a_denoise_launch_that_are_too_many():
    arguments = emulated_extension().DenoiseArguments()
    with pytest.raises(ValueError, match="^denoise: steps: a launch takes up to 64, got 65"):
        arguments.set_numbers([[0.0] * 6] * 65)
    with pytest.raises(ValueError, match="^denoise: norm_bias: a launch takes up to 8, got 9"):
        arguments.norm_bias = [0] * 9


def test_a_gpu_of_too_few_multiprocessors_is_told_so():
    shape = DenoiseShape(tokens=22, passes=2, width=1280, depth=3, token_dim=16)
    few, more = (DeviceLimits({4: n // 4, 2: n // 2, 1: n}, 232_448) for n in (26, 27))
    assert "it takes 27 blocks at the same time, one a multiprocessor" in (
        obstacle_of_memory(shape, few)
    )
    assert "232448 bytes of shared memory are too few" in obstacle_of_memory(shape, more)


# Second derivatives -------------------------------------------------------------------------------


@needs_triton
@pytest.mark.parametrize("case", list(self_checks()), ids=lambda case: case.op.name)
def test_a_second_derivative_is_right_or_refused(case):
    if not case.has_gradient:
        pytest.skip("an op for sampling")

    def second(backend):
        inputs = [t.to(DEVICE, torch.float32) for t in case.inputs]
        leaves = case.leaves(inputs)
        result = case.run(backend, *inputs)
        gradients = torch.autograd.grad(result.square().sum(), leaves, create_graph=True)
        total = sum(gradient.square().sum() for gradient in gradients)
        return torch.autograd.grad(total, leaves)

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
    assert largest_error(case, backend, "cuda", torch.float16) < 1e-2
    inputs = [t.to("cuda", torch.float16) for t in case.inputs]
    with torch.no_grad():
        case.run(backend, *inputs)  # compiles it: without gradients it may be another kernel
        # Undoes what a capture that fails leaves behind, for the tests after it.
        recording = CUDARecorder()(lambda: case.run(backend, *inputs))
        for tensor in inputs:
            tensor.mul_(0.5)
        recording.replay()
        torch.testing.assert_close(recording.output, case.run(backend, *inputs), rtol=0, atol=0)
