import dataclasses

import kernel_cases
import op_times
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
from torch.nn import functional as F

from nova_kernels import (
    BackendError,
    BlockWeights,
    HeadWeights,
    Outside,
    StepCoefficients,
    denoise,
)
from nova_kernels.head_weights import with_unit_scale
from nova_kernels.ops import denoise as module

WIDTH, TOKEN_DIM, DEPTH = 48, 16, 2
SEQUENCES = ["reference", pytest.param("triton", marks=needs_triton)]


def numbers(steps, **guidance):
    return [StepCoefficients(1.0 - 0.1 * d, -0.2, **guidance) for d in range(steps)]


def inputs(
    shape,
    passes,
    steps,
    dtype=torch.float32,
    depth=DEPTH,
    width=WIDTH,
    token_dim=TOKEN_DIM,
):
    batch, tokens = shape
    seeds = iter(range(1000))

    def linear(out, into):
        weight = randn(out, into, dtype=dtype, seed=next(seeds)) * into**-0.5
        return weight, randn(out, dtype=dtype, seed=next(seeds)) * 0.1

    weights = HeadWeights(
        embed=linear(width, token_dim),
        blocks=tuple(
            BlockWeights(
                linear(width, width),
                linear(width, width),
                (1 + linear(width, 1)[1], linear(width, 1)[1]),
            )
            for _ in range(depth)
        ),
        modulations=(*(linear(3 * width, width) for _ in range(depth)), linear(2 * width, width)),
        head=linear(token_dim, width),
    )
    x = randn(batch, tokens, token_dim, dtype=dtype, seed=next(seeds))
    condition = randn(passes, batch, tokens, width, dtype=dtype, seed=next(seeds))
    times = randn(steps, width, dtype=dtype, seed=next(seeds))
    return x, condition, times, weights


def prepared(weights):
    """Weights as the op takes them: they hold 1 + scale."""
    modulations = tuple(with_unit_scale(*linear) for linear in weights.modulations)
    return dataclasses.replace(weights, modulations=modulations)


def run(x, condition, times, weights, steps, **options):
    with torch.no_grad():
        return denoise(x, condition, times, prepared(weights), steps, **options)


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


@pytest.mark.parametrize("backend", SEQUENCES)
@pytest.mark.parametrize("passes, guided", [(1, None), (2, None), (2, 1), (2, 0), (3, 2)])
def test_the_loop_is_what_its_contract_says(passes, guided, backend):
    steps = numbers(3, guidance=4.0, image_guidance=1.5)
    given = inputs((2, 5), passes, 3)
    with poisoned():
        result = run(*given, steps, guided_steps=guided, backend=backend)
    expected = written_out(*given, steps, guided)
    assert torch.allclose(result, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", SEQUENCES)
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
    with poisoned():
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
    # But how products of other numbers of rows are summed, in some versions of torch.
    chunked = run(*given, steps, guided_steps=3)
    torch.testing.assert_close(chunked, whole, rtol=1e-5, atol=1e-6)


def small_case():
    """Arguments for both kinds of guidance, of one block: (inputs, steps, options)."""
    steps = numbers(2, guidance=4.0, renorm=0.2)
    steps = [dataclasses.replace(step, noise=0.3 * (d < 1)) for d, step in enumerate(steps)]
    x, *others = inputs((2, 3), 2, 2, depth=1, width=32)
    noise, around, noise_around = (
        randn(*shape, TOKEN_DIM, seed=50) for shape in ((2, 2, 3), (2, 4), (2, 2, 4))
    )
    return (x, *others), steps, {"noise": noise, "outside": Outside(around, noise_around)}


def flat(given, steps, backend, guided_steps, noise=None, outside=None):
    """Arguments of the operator."""
    x, condition, times, weights = given
    coefficients = [number for step in steps for number in step.as_list()]
    around = (None, None) if outside is None else (outside.tokens, outside.noise)
    mlp = weights.tensors(), len(weights.blocks)
    return x, condition, times, *mlp, coefficients, guided_steps, noise, *around, backend


@pytest.mark.parametrize("backend", SEQUENCES)
def test_operator_contract(backend):
    given, steps, options = small_case()
    operator = torch.ops.nova_kernels.denoise
    arguments = flat(given, steps, backend, 1, **options)
    opcheck(operator.default, arguments)
    expected = denoise(*given, steps, guided_steps=1, backend=backend, **options)
    assert torch.equal(operator(*arguments), expected)
    quiet = numbers(2, guidance=3.0)
    expected = denoise(*given, quiet, backend=backend)
    assert torch.equal(operator(*flat(given, quiet, backend, 2)), expected)


def test_the_operator_checks_too():
    given, steps, options = small_case()
    x, condition, times, tensors, *others = flat(given, steps, "auto", 2, **options)
    operator = torch.ops.nova_kernels.denoise
    with pytest.raises(ValueError, match="1 blocks need 14 tensors, got 13"):
        operator(x, condition, times, tensors[1:], *others)
    with pytest.raises(ValueError, match="head.weight must be"):
        operator(x, condition, times, [*tensors[:-2], tensors[-2][:8], tensors[-1]], *others)
    with pytest.raises(RuntimeError, match="has no gradient"):
        operator(x.requires_grad_(), condition, times, tensors, *others).sum().backward()


@pytest.mark.parametrize("backend", ["auto", *SEQUENCES])
@pytest.mark.parametrize("renormalised", [False, True])
def test_it_compiles_as_a_whole(renormalised, backend):
    (x, condition, times, weights), steps, options = small_case()
    if not renormalised:
        steps, options = numbers(2, guidance=3.0), {}

    def call(x, condition, times):
        return run(x, condition, times, weights, steps, backend=backend, **options)

    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for scale in (1, 2):
        result = compiled(x * scale, condition, times)
        expected = written_out(
            x * scale,
            condition,
            times,
            weights,
            steps,
            noise=options.get("noise"),
            outside=dataclasses.astuple(options["outside"]) if renormalised else None,
        )
        assert torch.allclose(result, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["auto", *SEQUENCES])
@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_no_tokens(shape, backend):
    steps = numbers(2, guidance=4.0, renorm=0.5)
    assert run(*inputs(shape, 2, 2), steps, backend=backend).shape == (*shape, TOKEN_DIM)


@needs_triton
def test_gradients_are_the_references_alone():
    (x, condition, times, weights), steps = inputs((1, 2), 2, 2), numbers(2, guidance=3.0)
    given = x.requires_grad_(), condition.requires_grad_(), times.requires_grad_()
    ours = torch.autograd.grad(
        denoise(*given, prepared(weights), steps, backend="reference").sum(), given
    )
    expected = torch.autograd.grad(written_out(*given, weights, steps).sum(), given)
    for gradient, right in zip(ours, expected, strict=True):
        assert torch.allclose(gradient, right, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="'triton' has no gradient"):
        denoise(*given, prepared(weights), steps, backend="triton")


@pytest.mark.parametrize("backend", ["auto", *SEQUENCES])
def test_autocast_changes_nothing(backend):
    given, steps = inputs((2, 3), 2, 2), numbers(2, guidance=3.0)
    expected = run(*given, steps, backend=backend)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(run(*given, steps, backend=backend), expected)


def test_the_benchmarks_case_counts_and_gates():
    case = kernel_cases.denoise(1, 3, 16, width=32, depth=2, steps=5)
    parameters = 32 * 16 + 32 + 2 * (2 * (32 * 32 + 32) + 2 * 32)  # embedding, blocks
    parameters += (2 * 3 + 2) * (32 * 32 + 32) + 16 * 32 + 16  # modulations, head
    assert case.elements == (2 * 3 * 16 + 2 * 3 * 32 + 5 * 32 + parameters, None)
    products = (2 * 2 + 2 * 3 + 2) * 32 * 32 + 32 * 16  # of a row in a step
    assert case.operations == (2 * 5 * (6 * products + 3 * 32 * 16), 0)
    assert op_times.implementations(case).keys() >= {"reference", "triton", "cuda"}

    def by(backend):
        return lambda *tensors: case.run(backend, *tensors)

    # "auto" is C++ on a CPU, in float32, where it is built.
    calls = {"reference": by("reference"), "auto": by("auto"), "wrong": lambda x, *_: x}
    refused = op_times.gate(case, calls, torch.device(DEVICE), torch.float32)
    assert refused.keys() == {"wrong"}


def test_every_weight_that_does_not_fit_is_named():
    *_, weights = inputs((1, 1), 1, 1)
    blocks = [f"blocks[{i}].{name}" for i in range(DEPTH) for name in ("fc1", "fc2", "norm")]
    modulations = [f"modulations[{i}]" for i in range(DEPTH + 1)]
    layers = ["embed", *blocks, *modulations, "head"]
    names = [f"{layer}.{part}" for layer in layers for part in ("weight", "bias")]
    tensors = weights.tensors()
    for k, (name, tensor) in enumerate(zip(names, tensors, strict=True)):
        if name == "embed.weight":  # which tells the sizes of all
            continue
        for wrong in (tensor[:1], tensor[None], torch.cat([tensor, tensor])):
            with pytest.raises(ValueError) as raised:
                HeadWeights.of_tensors([*tensors[:k], wrong, *tensors[k + 1 :]], DEPTH)
            shapes = f"must be {tuple(tensor.shape)}, got {tuple(wrong.shape)}"
            assert str(raised.value) == f"denoise: {name} {shapes}"
    for embed in (tensors[0][None], tensors[0][:, :0], tensors[0][:0]):
        with pytest.raises(ValueError, match="embed.weight must be .width, token_dim."):
            HeadWeights.of_tensors([embed, *tensors[1:]], DEPTH)
    with pytest.raises(ValueError, match="another one"):
        dataclasses.replace(weights, modulations=weights.modulations[1:])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"guided_steps": 4}, "guided_steps must be 0 to 3, got 4"),
        ({"guided_steps": -1}, "guided_steps must be 0 to 3, got -1"),
        ({"outside": Outside(torch.ones(1, 7, 16))}, "outside.tokens must be .2, any number, 16."),
        ({"outside": Outside(torch.ones(2, 7, 8))}, "outside.tokens must be"),
        ({"outside": Outside(torch.ones(2, 16))}, "outside.tokens must be"),
        (
            {"outside": Outside(torch.ones(2, 7, 16), torch.ones(2, 2, 7, 16))},
            "outside.noise must be .3, 2, 7, 16.",
        ),
        ({"outside": Outside(torch.ones(2, 7, 16, device="meta"))}, "on one device, got"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        run(*inputs((2, 5), 2, 3), numbers(3), **options)


def test_arguments_that_do_not_fit():
    (x, condition, times, weights), steps = inputs((2, 5), 2, 3), numbers(3)
    noisy = [dataclasses.replace(step, noise=0.1) for step in steps]
    with pytest.raises(ValueError, match="x must be"):
        run(x[0], condition, times, weights, steps)
    with pytest.raises(ValueError, match="steps not empty"):
        run(x, condition, times, weights, [])
    with pytest.raises(ValueError, match="x must have a floating dtype"):
        run(x.int(), condition, times, weights, steps)
    with pytest.raises(ValueError, match="x has tokens of 8 values, and embed.weight takes 16"):
        run(x[..., :8], condition, times, weights, steps)
    with pytest.raises(ValueError, match="condition must be .2, 2, 5, 48."):
        run(x, condition[:, :, :4], times, weights, steps)
    with pytest.raises(ValueError, match="condition must be .1 to 3 passes"):
        run(x, condition[0], times, weights, steps)
    with pytest.raises(ValueError, match="time_embeddings"):
        run(x, condition, times[:2], weights, steps)
    with pytest.raises(ValueError, match="add noise"):
        run(x, condition, times, weights, noisy)
    for noise in (randn(3, *x.shape).double(), randn(3, *x.shape).to("meta")):
        with pytest.raises(ValueError, match="noise must be torch.float32 on"):
            run(x, condition, times, weights, noisy, noise=noise)
    with pytest.raises(ValueError, match="outside needs its own"):
        run(x, condition, times, weights, noisy, noise=randn(3, *x.shape), outside=Outside(x))
    with pytest.raises(ValueError, match="on one device, got"):
        run(x, condition.to("meta"), times, weights, steps)
    on_cpu = HeadWeights.of_tensors([tensor.cpu() for tensor in weights.tensors()], DEPTH)
    with pytest.raises(BackendError, match="on a GPU"):
        run(x.cpu(), condition.cpu(), times.cpu(), on_cpu, steps, backend="cuda")
