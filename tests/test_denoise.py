import dataclasses

import pytest
import torch
from kernel_testing import DTYPES, assert_as_exact_as_torch, needs_triton, poisoned, randn
from torch.nn import functional as F

from nova_kernels import (
    BackendError,
    BlockWeights,
    HeadWeights,
    Outside,
    StepCoefficients,
    denoise,
)
from nova_kernels.ops import denoise as module
from nova_kernels.ops.denoise import with_unit_scale

WIDTH, TOKEN_DIM, DEPTH = 48, 16, 2


def numbers(steps, **guidance):
    return [StepCoefficients(1.0 - 0.1 * d, -0.2, **guidance) for d in range(steps)]


def inputs(shape, passes, steps, dtype=torch.float32, depth=DEPTH, width=WIDTH):
    batch, tokens = shape
    seeds = iter(range(1000))

    def linear(out, into):
        weight = randn(out, into, dtype=dtype, seed=next(seeds)) * into**-0.5
        return weight, randn(out, dtype=dtype, seed=next(seeds)) * 0.1

    weights = HeadWeights(
        embed=linear(width, TOKEN_DIM),
        blocks=tuple(
            BlockWeights(
                linear(width, width),
                linear(width, width),
                (1 + linear(width, 1)[1], linear(width, 1)[1]),
            )
            for _ in range(depth)
        ),
        modulations=(*(linear(3 * width, width) for _ in range(depth)), linear(2 * width, width)),
        head=linear(TOKEN_DIM, width),
    )
    x = randn(batch, tokens, TOKEN_DIM, dtype=dtype, seed=next(seeds))
    condition = randn(passes, batch, tokens, width, dtype=dtype, seed=next(seeds))
    times = randn(steps, width, dtype=dtype, seed=next(seeds))
    return x, condition, times, weights


def run(x, condition, times, weights, steps, **options):
    """The op, whose weights hold 1 + scale."""
    modulations = tuple(with_unit_scale(*linear) for linear in weights.modulations)
    prepared = dataclasses.replace(weights, modulations=modulations)
    with torch.no_grad():
        return denoise(x, condition, times, prepared, steps, **options)


def written_out(x, condition, times, weights, steps, guided=None, noise=None, outside=None):
    """The loop as its contract states it; `outside` (tokens, noise) are just more tokens."""
    inside = x.shape[1]
    width = weights.width
    whole = x if outside is None else torch.cat([x, outside[0]], dim=1)
    for d, step in enumerate(steps):
        passes = condition if guided is None or d < guided else condition[:1]
        predictions = []
        for cond in passes:
            z = F.silu(cond + times[d])
            h = F.linear(whole[:, :inside], *weights.embed)
            for block, modulation in zip(weights.blocks, weights.modulations, strict=False):
                scale, shift, gate = F.linear(z, *modulation).chunk(3, -1)
                y = F.layer_norm(h, (width,), eps=1e-6) * (1 + scale) + shift
                y = F.linear(F.silu(F.linear(y, *block.fc1)), *block.fc2)
                h = h + gate * F.layer_norm(y, (width,), *block.norm, eps=1e-5)
            scale, shift = F.linear(z, *weights.modulations[-1]).chunk(2, -1)
            h = F.layer_norm(h, (width,), eps=1e-6) * (1 + scale) + shift
            predicted = F.linear(h, *weights.head)
            predictions.append(torch.cat([predicted, whole[:, inside:]], dim=1))
        result = predictions[0]
        if len(predictions) > 1:
            uncond, image = predictions[1], predictions[-1]
            result = uncond + step.guidance * (result - image)
            if step.renorm < 1:
                ratio = predictions[0].norm(dim=(1, 2)) / result.norm(dim=(1, 2))
                result = result * ratio.clamp(step.renorm, 1)[:, None, None]
            if len(predictions) == 3:
                result = result + step.image_guidance * (image - uncond)
        whole = step.sample * whole + step.prediction * result
        if step.noise:
            fresh = noise[d] if outside is None else torch.cat([noise[d], outside[1][d]], dim=1)
            whole = whole + step.noise * fresh
    return whole[:, :inside]


def doubled(weights):
    def linear(pair):
        return tuple(tensor.double() for tensor in pair)

    blocks = (BlockWeights(*map(linear, vars(block).values())) for block in weights.blocks)
    return HeadWeights(
        linear(weights.embed),
        tuple(blocks),
        tuple(map(linear, weights.modulations)),
        linear(weights.head),
    )


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("passes, guided", [(1, None), (2, None), (2, 1), (2, 0), (3, 2)])
def test_the_loop_is_what_its_contract_says(passes, guided, backend):
    steps = numbers(3, guidance=4.0, image_guidance=1.5)
    given = inputs((2, 5), passes, 3)
    with poisoned():
        result = run(*given, steps, guided_steps=guided, backend=backend)
    expected = written_out(*given, steps, guided)
    assert torch.allclose(result, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("passes", [2, 3])
def test_noise_and_renormalisation_over_what_is_outside(passes, noisy, backend):
    steps = numbers(3, guidance=4.0, image_guidance=0.5, renorm=0.2)
    x, *others = inputs((2, 5), passes, 3)
    around = randn(2, 9, TOKEN_DIM, seed=50)
    noise, noise_around = randn(3, *x.shape, seed=51), randn(3, *around.shape, seed=52)
    if noisy:  # the last step adds none, as DDPM's does
        steps = [dataclasses.replace(s, noise=0.3 * (d < 2)) for d, s in enumerate(steps)]
    options = {"noise": noise} if noisy else {}
    outside = Outside(around, noise_around if noisy else None)
    result = run(x, *others, steps, outside=outside, backend=backend, **options)
    expected = written_out(x, *others, steps, noise=noise, outside=(around, noise_around))
    assert torch.allclose(result, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@needs_triton
def test_triton_is_as_exact_as_torch(dtype):
    steps = numbers(4, guidance=3.0)
    x, condition, times, weights = inputs((1, 7), 2, 4, dtype)
    exact = written_out(x.double(), condition.double(), times.double(), doubled(weights), steps)
    by_torch = written_out(x, condition, times, weights, steps)
    result = run(x, condition, times, weights, steps, backend="triton")
    assert_as_exact_as_torch(result, by_torch, exact)


def test_chunks_of_modulations_change_nothing(monkeypatch):
    given, steps = inputs((2, 5), 2, 5), numbers(5, guidance=4.0)
    whole = run(*given, steps, guided_steps=3)
    monkeypatch.setattr(module, "MODULATION_BUDGET", 1)
    assert torch.equal(run(*given, steps, guided_steps=3), whole)


def test_arguments_that_do_not_fit():
    (x, condition, times, weights), steps = inputs((2, 5), 2, 3), numbers(3)
    noisy = [dataclasses.replace(step, noise=0.1) for step in steps]
    with pytest.raises(ValueError, match="x must be"):
        run(x[0], condition, times, weights, steps)
    with pytest.raises(ValueError, match="steps not empty"):
        run(x, condition, times, weights, [])
    with pytest.raises(ValueError, match="a pass of condition"):
        run(x, condition[:, :, :4], times, weights, steps)
    with pytest.raises(ValueError, match="time_embeddings"):
        run(x, condition, times[:2], weights, steps)
    with pytest.raises(ValueError, match="add noise"):
        run(x, condition, times, weights, noisy)
    for noise in (randn(3, *x.shape).double(), randn(3, *x.shape).to("meta")):
        with pytest.raises(ValueError, match="noise must be torch.float32 on"):
            run(x, condition, times, weights, noisy, noise=noise)
    with pytest.raises(ValueError, match="another one"):
        one_less = dataclasses.replace(weights, modulations=weights.modulations[1:])
        run(x, condition, times, one_less, steps)
    with pytest.raises(BackendError, match="on a GPU"):
        run(x.cpu(), condition.cpu(), times, weights, steps, backend="cuda")
