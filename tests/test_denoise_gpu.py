"""The persistent denoise kernel on a GPU; tests/test_denoise_cuda.py emulates it elsewhere."""

import dataclasses

import pytest
import torch
from kernel_testing import assert_as_exact_as_torch, in_float64, poisoned, randn
from test_denoise import doubled, inputs, numbers, run, written_out

from nova_kernels import Outside
from nova_kernels.cuda_kernels import denoise as kernel
from nova_kernels.cuda_kernels import extension
from nova_kernels.cuda_kernels.denoise_plan import CLUSTER_SIZES, plan_denoise
from nova_kernels.ops.denoise import modulate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(extension.obstacle() is not None, reason="the CUDA extension is not built"),
]
HALVES = [torch.float16, torch.bfloat16]


def check(given, steps, noise=None, around=None):
    """around: tokens outside of the set."""
    outside = None if around is None else Outside(around)
    with poisoned():
        result = run(*given, steps, noise=noise, outside=outside, backend="cuda")

    def plain(x, condition, times, noise, around, weights):
        outside = None if around is None else (around, None)
        return written_out(x, condition, times, weights, steps, noise=noise, outside=outside)

    *tensors, weights = given
    tensors += noise, around
    exact = plain(*in_float64(*tensors), doubled(weights))
    assert_as_exact_as_torch(result, plain(*tensors, weights), exact)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("width", [192, 768, 1024, 1280, 1536])
@pytest.mark.parametrize("depth", [1, 3, 8])
def test_widths_and_depths(width, depth, dtype):
    steps = numbers(3, guidance=3.0)
    check(inputs((1, 22), 2, 3, dtype, depth=depth, width=width), steps)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    "rows, passes", [(1, 1), (2, 2), (22, 2), (32, 2), (36, 3), (64, 2), (128, 1)]
)
def test_numbers_of_rows(rows, passes, dtype):
    steps = numbers(3, guidance=3.0, image_guidance=1.5)
    check(inputs((1, rows), passes, 3, dtype, depth=3, width=1280), steps)


@pytest.mark.parametrize("cluster_size", CLUSTER_SIZES)
def test_every_division_gives_nearly_the_same(cluster_size):
    x, condition, times, weights = inputs((1, 22), 2, 4, torch.bfloat16, depth=3, width=1280)
    steps, module = numbers(4, guidance=3.0), extension.extension()
    shape = kernel.shape_of(x, condition, weights)
    limits = kernel.device_limits(module, x.device, x.dtype, 2)
    limits = dataclasses.replace(limits, clusters={cluster_size: limits.clusters[cluster_size]})
    plan = plan_denoise(shape, limits)
    if plan is None:
        pytest.skip(f"this GPU has no clusters of {cluster_size}")
    vectors = modulate(weights, condition, times)
    result = kernel.run(x, vectors, weights, steps, plan=plan)
    streamed = dataclasses.replace(plan, weight_slots=2)
    assert torch.equal(kernel.run(x, vectors, weights, steps, plan=streamed), result)
    torch.testing.assert_close(result, kernel.run(x, vectors, weights, steps), rtol=5e-2, atol=5e-2)


def test_noise_and_renormalisation():
    steps = numbers(3, guidance=4.0, renorm=0.2)
    steps = [dataclasses.replace(step, noise=0.3 * (d < 2)) for d, step in enumerate(steps)]
    given = inputs((3, 11), 2, 3, torch.bfloat16, depth=3, width=1024)
    check(given, steps, noise=torch.randn(3, *given[0].shape, device="cuda").to(torch.bfloat16))


def test_renormalisation_of_tokens_of_64_values():
    """As an embedded model has them; what is outside counts in the norm."""
    given = inputs((3, 11), 2, 3, torch.bfloat16, depth=3, width=192, token_dim=64)
    around = randn(3, 9, 64, dtype=torch.bfloat16, seed=50)
    check(given, numbers(3, guidance=4.0, renorm=0.2), around=around)


@pytest.mark.parametrize("scale", [1e-30, 1e-7, 1e3])
def test_tiny_and_large_inputs(scale):
    """Down to denormal float16 numbers, and zeros; no NaN and no infinity comes of them."""
    steps = numbers(3, guidance=3.0)
    x, *others = inputs((1, 22), 2, 3, torch.float16, depth=3, width=1280)
    check((x * scale, *others), steps)


def test_a_thousand_repetitions_are_bit_identical():
    given, steps = (
        inputs((1, 22), 2, 5, torch.bfloat16, depth=3, width=1280),
        numbers(5, guidance=3.0),
    )
    first = run(*given, steps, backend="cuda")
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        different += (run(*given, steps, backend="cuda") != first).sum()
    assert int(different) == 0


def test_a_captured_launch_gives_the_same():
    given, steps = (
        inputs((1, 22), 2, 5, torch.bfloat16, depth=3, width=1280),
        numbers(5, guidance=3.0),
    )
    expected = run(*given, steps, backend="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(*given, steps, backend="cuda")
    captured.fill_(torch.nan)
    for _ in range(3):
        graph.replay()
        assert torch.equal(captured, expected)
