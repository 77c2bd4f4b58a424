"""Every op on small inputs, against its reference: what a newcomer's unknown card is tried with."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nova_kernels.dispatch import Op
from nova_kernels.head_weights import BlockWeights, HeadWeights
from nova_kernels.ops import (
    block_causal_attention,
    denoise,
    diffusion_step,
    frame_scale_shift,
    linear_gelu,
    residual_norm,
    rope3d,
    scale_shift,
)

# Errors relative to the reference in float64, at most.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class SelfCheck:
    """An op with inputs.

    Attributes:
        op: what is checked.
        inputs: tensors that have one dtype.
        run: (backend, *inputs) -> result, differentiable in the inputs if `has_gradient`.
        has_gradient: whether gradients are checked too.
        num_tables: how many of the last inputs never have a gradient.
    """

    op: Op
    inputs: list[Tensor]
    run: Callable[..., Tensor]
    has_gradient: bool = True
    num_tables: int = 0

    def leaves(self, inputs: list[Tensor]) -> list[Tensor]:
        """Those of `inputs` that have a gradient, and ask for it from here on."""
        leaves = inputs[: len(inputs) - self.num_tables] if self.has_gradient else []
        return [t.requires_grad_() for t in leaves]


def self_checks() -> Iterator[SelfCheck]:
    """A case of every op, in float64 on the CPU."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")

    rows, vector = (5, 33, 192), (5, 1, 192)
    yield SelfCheck(
        scale_shift.OP,
        [randn(*rows), randn(*vector), randn(*vector)],
        lambda backend, *t: scale_shift.scale_shift(*t, backend=backend),
    )
    yield SelfCheck(
        residual_norm.OP,
        [randn(*rows), randn(*rows), randn(192), randn(192), randn(*vector)],
        lambda backend, x, h, weight, bias, gate: residual_norm.residual_norm(
            x, h, weight, bias, gate=gate, backend=backend
        ),
    )
    yield SelfCheck(
        linear_gelu.OP,
        [randn(5, 33, 192), randn(768, 192) * 0.1, randn(768)],
        lambda backend, *t: linear_gelu.linear_gelu(*t, backend=backend),
    )
    weights = [randn(24, 192) * 0.1, randn(384, 24) * 0.2, randn(384)]
    yield SelfCheck(
        frame_scale_shift.OP,
        [randn(2, 1, 17, 192), randn(2, 3, 17, 192), *weights],
        lambda backend, *t: frame_scale_shift.frame_scale_shift(*t, backend=backend),
    )
    angles = randn(1, 33, 16)
    yield SelfCheck(
        rope3d.OP,
        [randn(2, 33, 3 * 4 * 32), angles.cos(), angles.sin()],
        lambda backend, *t: rope3d.rope3d(*t, 4, backend=backend),
        num_tables=2,
    )
    step = diffusion_step.StepCoefficients(0.9, -0.1, noise=0.2, guidance=5.0, renorm=0.5)
    yield SelfCheck(
        diffusion_step.OP,
        [randn(3, 17, 16), randn(2, 3, 17, 16), randn(3, 17, 16)],
        lambda backend, x, predictions, noise: diffusion_step.diffusion_step(
            x, predictions, step, noise=noise, backend=backend
        )[0],
        has_gradient=False,
    )
    yield _denoise_check(randn)
    for head_dim in block_causal_attention.HEAD_DIMS:
        now, before = (1, 2, 90, head_dim), (1, 2, 40, head_dim)
        yield SelfCheck(
            block_causal_attention.OP,
            [randn(*now), randn(*now), randn(*now), randn(*before), randn(*before)],
            lambda backend, q, k, v, *prefix: block_causal_attention.block_causal_attention(
                q, k, v, [40, 17, 33], prefix_kv=prefix, backend=backend
            ),
        )


def _denoise_check(randn: Callable[..., Tensor]) -> SelfCheck:
    """Three steps of a small MLP, the second noisy, with guidance."""
    width, token_dim, depth = 192, 16, 2
    sizes = [(width, token_dim), *[(width, width)] * 2 * depth]
    sizes += [(3 * width, width)] * depth + [(2 * width, width), (token_dim, width)]
    linears = [part for out, into in sizes for part in (randn(out, into) * into**-0.5, randn(out))]
    norms = [randn(width) for _ in range(2 * depth)]
    steps = [
        diffusion_step.StepCoefficients(0.9, -0.2, noise=noise, guidance=3.0)
        for noise in (0.0, 0.3, 0.0)
    ]

    def run(backend: str, x: Tensor, condition: Tensor, times: Tensor, noise: Tensor, *weights):
        layers = list(zip(weights[: len(linears) : 2], weights[1 : len(linears) : 2], strict=True))
        affine = weights[len(linears) :]
        blocks = tuple(
            BlockWeights(*layers[1 + 2 * i : 3 + 2 * i], affine[2 * i : 2 * i + 2])
            for i in range(depth)
        )
        modulations = tuple(layers[1 + 2 * depth : -1])
        head = HeadWeights(layers[0], blocks, modulations, layers[-1])
        with torch.no_grad():
            return denoise.denoise(x, condition, times, head, steps, noise=noise, backend=backend)

    inputs = [randn(1, 22, token_dim), randn(2, 1, 22, width), randn(3, width)]
    inputs += [randn(3, 1, 22, token_dim), *linears, *norms]
    return SelfCheck(denoise.OP, inputs, run, has_gradient=False)


def largest_error(check: SelfCheck, backend: str, device: str, dtype: torch.dtype) -> float:
    """Relative error of result and gradients against the reference in float64, the largest.

    Raises:
        BackendError: the backend cannot run here.
    """
    # Inputs are rounded first, so that only the computation differs.
    inputs = [t.to(device, dtype) for t in check.inputs]
    exact_inputs = [t.double() for t in inputs]
    leaves, exact_leaves = check.leaves(inputs), check.leaves(exact_inputs)
    result, exact = check.run(backend, *inputs), check.run("reference", *exact_inputs)
    pairs = [(result, exact)]
    if check.has_gradient:
        # Random ones: a norm's gradient of constant ones is zero but for rounding.
        generator = torch.Generator().manual_seed(1)
        options = {"dtype": torch.float32, "device": "cpu"}
        grad = torch.randn(exact.shape, generator=generator, **options).to(device, dtype)
        gradients = torch.autograd.grad(result, leaves, grad)
        exact_gradients = torch.autograd.grad(exact, exact_leaves, grad.double())
        pairs += zip(gradients, exact_gradients, strict=True)
    differences = ((a.detach().double(), b.detach()) for a, b in pairs)
    errors = [(a - b).norm() / b.norm() for a, b in differences]
    return float(torch.stack(errors).max().nan_to_num(torch.inf))
