import dataclasses
import itertools

import pytest
import torch
from kernel_testing import (
    DEVICE,
    DTYPES,
    assert_as_exact_as_torch,
    needs_triton,
    opcheck,
    poisoned,
    randn,
)

from nova_kernels import StepCoefficients, diffusion_step
from nova_kernels.ops.diffusion_step import reference

STEP = StepCoefficients(0.9, -0.3, noise=0.2, guidance=5.0, image_guidance=1.5)
SHAPES = [(1, 1, 1), (2, 3, 16), (3, 5, 7), (2, 70, 64)]


def inputs(shape, passes, dtype=torch.float32, *, masked=False):
    batch, tokens, _ = shape
    x, noise = (randn(*shape, dtype=dtype, seed=k) for k in (1, 2))
    predictions = randn(passes, *shape, dtype=dtype, seed=3)
    mask = (torch.arange(batch * tokens).view(batch, tokens) % 3 > 0).to(DEVICE)
    outside = torch.arange(1, batch + 1, dtype=torch.float32, device=DEVICE) * 10
    return x, predictions, noise, outside, mask if masked else None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("passes, renorm, masked", itertools.product((1, 2, 3), (1.0, 0.3), (0, 1)))
@pytest.mark.parametrize("shape", SHAPES)
@needs_triton
def test_triton_is_as_exact_as_torch(shape, passes, renorm, masked, dtype):
    x, predictions, noise, outside, mask = inputs(shape, passes, dtype, masked=masked)
    step = dataclasses.replace(STEP, renorm=renorm)
    exact = [t.double() for t in (x, predictions)]
    right, factor = reference(*exact, step, noise.double(), outside, mask)
    with poisoned():
        result, factors = diffusion_step(
            x, predictions, step, noise=noise, outside=outside, mask=mask, backend="triton"
        )
    by_torch, _ = reference(x, predictions, step, noise, outside, mask)
    # One rounding of the largest number that goes in: the result can be far smaller, as the single
    # value of the first shape is.
    largest = abs(STEP.prediction) * STEP.guidance * predictions.double().abs().amax(0)
    rounding = float(largest.norm() / right.norm()) * 2**-24
    assert_as_exact_as_torch(result, by_torch, right, rounding)
    assert torch.allclose(factors.double(), factor.double(), rtol=1e-5)
    if passes == 1 or renorm == 1:
        assert (factors == 1).all()
    elif shape[1] > 1:  # a single token is masked, or too little beside what is outside
        assert (factors < 1).any()


@pytest.mark.parametrize("guidance, size", [(0.2, 1), (5.0, 1), (5.0, 0)])
@pytest.mark.parametrize("passes", [2, 3])
@needs_triton
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter, for 0 / 0
def test_factors_of_renormalisation(passes, guidance, size):
    """At most 1, also where guidance makes the prediction smaller; NaN for one of nothing."""
    x, predictions = randn(3, 4, 8, seed=1), randn(passes, 3, 4, 8, seed=2) * size
    step = StepCoefficients(0.9, -0.3, guidance=guidance, image_guidance=1.5, renorm=0.3)
    results = diffusion_step(x, predictions, step, backend="triton")
    for found in zip(results, reference(x, predictions, step), strict=True):
        torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=needs_triton)])
def test_what_the_numbers_mean(backend):
    x, predictions, noise, _, mask = inputs((2, 3, 4), 2, masked=True)
    cond, uncond = predictions

    def step(**changes):
        options = {"sample": 1.0, "prediction": 0.0, **changes}
        return diffusion_step(
            x, predictions, StepCoefficients(**options), noise=noise, mask=mask, backend=backend
        )[0]

    def where_masked(value):
        return torch.where(mask[..., None], value, x)

    assert torch.equal(step(), x)
    assert torch.allclose(step(prediction=-0.5), where_masked(x - 0.5 * cond))
    assert torch.allclose(step(prediction=1.0, guidance=0.0), where_masked(x + uncond))
    assert torch.allclose(step(sample=0.0, noise=2.0), where_masked(2 * noise))
    # Renormalised without a lower bound, the guided prediction is as long as the conditional one.
    guided = step(sample=0.0, prediction=1.0, guidance=9.0, renorm=0.0)
    for ours, of_cond, chosen in zip(guided, cond, mask, strict=True):
        assert torch.allclose(ours[chosen].norm(), of_cond[chosen].norm())


def test_coefficients_as_a_list_are_in_the_order_of_the_fields():
    assert StepCoefficients(*range(6)).as_list() == list(range(6))


def test_three_passes_and_renorm_over_the_whole_frame():
    """Written out over whole frames, with the noisy tokens as predictions outside the set."""
    numbers = StepCoefficients(0.0, 1.0, guidance=4.0, image_guidance=1.5, renorm=0.3)
    for passes in (2, 3):
        outside, inside = randn(2, 7, 4, seed=1), randn(passes, 2, 3, 4, seed=2)
        squares = outside.square().sum((1, 2))
        guided, factor = diffusion_step(inside[0], inside, numbers, outside=squares)
        cond, uncond, *_, image = [torch.cat([x, outside], dim=1) for x in (*inside, inside[-1])]
        expected = uncond + 4.0 * (cond - image)
        ratio = cond.norm(dim=(1, 2)) / expected.norm(dim=(1, 2))
        assert torch.allclose(factor, ratio.clamp(0.3, 1.0))
        expected = expected * factor[:, None, None] + 1.5 * (image - uncond)
        assert torch.allclose(guided, expected[:, :3], atol=1e-5)
        assert torch.allclose(factor[:, None, None] * outside, expected[:, 3:], atol=1e-5)


@needs_triton
def test_operator_contract_and_compile():
    x, predictions, noise, outside, mask = inputs((2, 3, 8), 2, masked=True)
    step = dataclasses.replace(STEP, renorm=0.5)
    numbers = list(vars(step).values())
    arguments = (x, predictions, noise, outside, mask, numbers, "triton")
    opcheck(torch.ops.nova_kernels.diffusion_step.default, arguments)

    def run(*tensors):
        x, predictions, noise, outside, mask = tensors
        options = {"noise": noise, "outside": outside, "mask": mask}
        return diffusion_step(x, predictions, step, **options, backend="triton")

    tensors = x, predictions, noise, outside, mask
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    expected = reference(x, predictions, step, noise, outside, mask)
    with torch.inference_mode():
        for result in (compiled(*tensors), run(*tensors)):
            for ours, right in zip(result, expected, strict=True):
                assert torch.allclose(ours, right, atol=1e-5)


@needs_triton
def test_strided_inputs():
    x, predictions, noise, *_ = inputs((4, 6, 8), 2)
    result, _ = diffusion_step(
        x[::2, :3], predictions[:, ::2, :3], STEP, noise=noise[::2, 3:], backend="triton"
    )
    expected, _ = reference(x[::2, :3], predictions[:, ::2, :3], STEP, noise[::2, 3:])
    assert torch.allclose(result, expected, atol=1e-5)


def test_arguments_that_do_not_fit():
    x, predictions, noise, outside, mask = inputs((2, 3, 8), 2, masked=True)
    quiet = StepCoefficients(1.0, 1.0)
    with pytest.raises(ValueError, match="x must be"):
        diffusion_step(x[0], predictions, quiet)
    with pytest.raises(ValueError, match="predictions must be"):
        diffusion_step(x, predictions[:, :1], quiet)
    with pytest.raises(ValueError, match="adds noise"):
        diffusion_step(x, predictions, STEP)
    with pytest.raises(ValueError, match="noise must be"):
        diffusion_step(x, predictions, STEP, noise=noise[:1])
    with pytest.raises(ValueError, match="outside must be"):
        diffusion_step(x, predictions, quiet, outside=outside.double())
    with pytest.raises(ValueError, match="mask must be"):
        diffusion_step(x, predictions, quiet, mask=mask.float())


@needs_triton
def test_no_gradient():
    x, predictions, *_ = inputs((2, 3, 8), 1)
    with pytest.raises(ValueError, match="no gradient"):
        diffusion_step(
            x.requires_grad_(), predictions, StepCoefficients(1.0, 1.0), backend="triton"
        )
