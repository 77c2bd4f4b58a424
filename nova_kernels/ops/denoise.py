"""The denoise loop of a set of tokens: all steps of NOVA's diffusion MLP in one call.

In step d the MLP (arXiv 2412.14169; adaptive norms as in DiT, arXiv 2212.09748) predicts from the
tokens x and z = silu(condition + time_embedding[d]):

    h = embed(x)
    per block:  scale, shift, gate = modulation(z)
                h = h + gate * LN(fc2(silu(fc1(LN(h) * (1 + scale) + shift))))
    scale, shift = last modulation(z)
    prediction = head(LN(h) * (1 + scale) + shift)

and `diffusion_step` makes the next x. z is known before the loop, so all modulations come from one
matrix product over all steps; what is left in the loop is a third of the MLP's weights.

The reference and Triton are a sequence of launches: `scale_shift`, `residual_norm` and
`diffusion_step` in the backend asked for, and matrix products of torch. In CUDA all steps are one
launch (docs/denoise.md); in C++, for CPUs, they are one call.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from nova_kernels.dispatch import Op, requested
from nova_kernels.ops.diffusion_step import StepCoefficients, diffusion_step
from nova_kernels.ops.residual_norm import residual_norm
from nova_kernels.ops.scale_shift import scale_shift

OP = Op("denoise", implementations=("cuda", "triton", "cpp"), verified=frozenset({"cpp"}))
ADA_NORM_EPS = 1e-6
NORM_EPS = 1e-5
# Modulation vectors are made for as many steps at once as fit this many bytes.
MODULATION_BUDGET = 256 * 2**20
# What a launch of the CUDA kernel takes (csrc/arguments.h).
MAX_STEPS_PER_LAUNCH = 64

Linear = tuple[Tensor, Tensor]  # weight (out, in), bias (out,)


@dataclass(frozen=True)
class BlockWeights:
    """A block of the MLP: two linear layers (width, width), and the norm of what they make."""

    fc1: Linear
    fc2: Linear
    norm: Linear


@dataclass(frozen=True)
class HeadWeights:
    """The diffusion MLP as the loop reads it.

    Attributes:
        embed: (width, token_dim).
        blocks: one after the other.
        modulations: (3 * width, width) for each block: scale, shift, gate; then (2 * width, width):
            scale, shift. Their scales hold 1 + scale: see `with_unit_scale`.
        head: (token_dim, width).
    """

    embed: Linear
    blocks: tuple[BlockWeights, ...]
    modulations: tuple[Linear, ...]
    head: Linear

    @property
    def width(self) -> int:
        return self.embed[0].shape[0]

    @cached_property
    def packed(self) -> dict[str, Any]:
        """The weights as the C++ kernel reads them, made at its first call (`renew` forgets it)."""
        return OP.module("cpp").pack(self)

    def renew(self) -> None:
        """To be called where weights were changed in place."""
        self.__dict__.pop("packed", None)

    def tensors(self) -> list[Tensor]:
        """All weights and biases, always in one order."""
        blocks = [linear for block in self.blocks for linear in vars(block).values()]
        linears = [self.embed, *blocks, *self.modulations, self.head]
        return [tensor for linear in linears for tensor in linear]


@dataclass(frozen=True)
class Outside:
    """Noisy tokens outside the set, which renormalised guidance counts in its norms.

    Every pass "predicts" these tokens themselves there, so they evolve as x <- f x + n noise, with
    a factor f a sample.

    Attributes:
        tokens: (batch, m, token_dim) at the start.
        noise: (steps, batch, m, token_dim), where steps add noise.
    """

    tokens: Tensor
    noise: Tensor | None = None


def with_unit_scale(weight: Tensor, bias: Tensor) -> Linear:
    """A modulation whose first output is 1 + scale instead of scale; the weight is not copied."""
    bias = bias.clone()
    bias[: weight.shape[1]] += 1
    return weight, bias


def denoise(
    x: Tensor,
    condition: Tensor,
    time_embeddings: Tensor,
    weights: HeadWeights,
    steps: Sequence[StepCoefficients],
    *,
    guided_steps: int | None = None,
    noise: Tensor | None = None,
    outside: Outside | None = None,
    backend: str = "auto",
) -> Tensor:
    """Noisy tokens -> clean tokens. For sampling: there is no gradient through kernels.

    Args:
        x: (batch, tokens, token_dim) noise.
        condition: (passes, batch, tokens, width), 1, 2 or 3 passes: what the encoder says of the
            tokens, projected to the MLP's width.
        time_embeddings: (len(steps), width).
        weights: of the MLP.
        steps: the numbers of every step.
        guided_steps: how many steps, from the first on, run all passes; later ones run the first
            pass alone, without guidance. None: all.
        noise: (len(steps), batch, tokens, token_dim), where steps add noise.
        outside: for renormalised guidance; None: nothing counts but x.
        backend: see `nova_kernels.dispatch`. "cuda" is one launch for what it takes
            (`cuda_kernels.denoise.obstacle`), else a sequence, in CUDA as far as that goes; "cpp"
            is one call for what it takes (`cpp_kernels.denoise.obstacle`), else the reference.

    Returns:
        (batch, tokens, token_dim).

    Raises:
        ValueError: shapes that do not fit, or an unknown backend.
        BackendError: the backend cannot run on these tensors.
    """
    _check(x, condition, time_embeddings, weights, steps, noise)
    whole_loop = _whole_loop(
        OP.choose(backend, x, condition), x, condition, weights, steps, outside
    )
    rows_backend = step_backend = requested(backend)
    if rows_backend == "cuda":
        step_backend = "triton"  # which has no launch of its own in CUDA
    elif rows_backend == "cpp":
        rows_backend = step_backend = "reference"
    passes = condition.shape[0]
    guided_steps = len(steps) if guided_steps is None or passes == 1 else guided_steps
    evolving = None if outside is None else _Evolving(outside, steps)
    linear = F.linear if whole_loop is None else whole_loop.linear
    for start, stop, count in ((0, guided_steps, passes), (guided_steps, len(steps), 1)):
        chunk = _steps_at_once(weights, condition[:count])
        for first in range(start, stop, chunk):
            last = min(first + chunk, stop)
            vectors = modulate(weights, condition[:count], time_embeddings[first:last], linear)
            if whole_loop is not None:
                x = whole_loop.run(
                    x,
                    vectors,
                    weights,
                    steps[first:last],
                    noise=None if noise is None else noise[first:last],
                    outside=None if evolving is None else evolving.squared_norm,
                )
                continue
            split = [_split(vector, weights.width) for vector in vectors]
            for d in range(first, last):
                here = [tuple(part[d - first] for part in parts) for parts in split]
                predictions = _predict(weights, x, here, rows_backend)
                x, factor = diffusion_step(
                    x,
                    predictions,
                    steps[d],
                    noise=noise[d] if noise is not None and steps[d].noise != 0 else None,
                    outside=None if evolving is None else evolving.squared_norm,
                    backend=step_backend,
                )
                if evolving is not None and count > 1:
                    evolving.step(d, factor)
    return x


def _whole_loop(
    chosen: str,
    x: Tensor,
    condition: Tensor,
    weights: HeadWeights,
    steps: Sequence[StepCoefficients],
    outside: Outside | None,
) -> ModuleType | None:
    """The module whose `run` takes all steps at once; None for a sequence of launches.

    Its `linear` makes the products before the loop.
    """
    if chosen not in ("cuda", "cpp"):
        return None
    module = OP.module(chosen)
    return None if module.obstacle(x, condition, weights, steps, outside) else module


def _steps_at_once(weights: HeadWeights, condition: Tensor) -> int:
    rows = condition[..., 0].numel()
    per_step = rows * sum(bias.numel() for _, bias in weights.modulations)
    fitting = MODULATION_BUDGET // max(per_step * condition.element_size(), 1)
    return max(1, min(fitting, MAX_STEPS_PER_LAUNCH))


def modulate(
    weights: HeadWeights,
    condition: Tensor,
    time_embeddings: Tensor,
    linear: Callable[[Tensor, Tensor, Tensor], Tensor] = F.linear,
) -> list[Tensor]:
    """Per modulation its scale, shift (and gate): (steps, passes, batch, tokens, 2 or 3 widths)."""
    z = F.silu(condition + time_embeddings[:, None, None, None])
    return [linear(z, *modulation) for modulation in weights.modulations]


def _split(vectors: Tensor, width: int) -> tuple[Tensor, ...]:
    return vectors.unflatten(-1, (-1, width)).unbind(-2)


def _predict(
    weights: HeadWeights, x: Tensor, vectors: list[tuple[Tensor, ...]], backend: str
) -> Tensor:
    """(passes, batch, tokens, token_dim) predictions of one step, from its vectors."""
    # One pass until the first block's vectors, which differ between passes, broadcast it.
    h = F.linear(x, *weights.embed)[None]
    options = {"eps": ADA_NORM_EPS, "add_one": False, "backend": backend}
    for block, (scale, shift, gate) in zip(weights.blocks, vectors, strict=False):
        y = scale_shift(h, scale, shift, **options)
        y = F.linear(F.silu(F.linear(y, *block.fc1)), *block.fc2)
        h = residual_norm(h, y, *block.norm, gate=gate, eps=NORM_EPS, backend=backend)
    scale, shift = vectors[-1]
    return F.linear(scale_shift(h, scale, shift, **options), *weights.head)


class _Evolving:
    """`Outside` on its way through the steps; without noise its squared norm is all there is."""

    def __init__(self, outside: Outside, steps: Sequence[StepCoefficients]):
        self._steps, self._noise = steps, outside.noise
        self._tokens = None if outside.noise is None else outside.tokens
        self.squared_norm = _squared_norm(outside.tokens)

    def step(self, d: int, factor: Tensor) -> None:
        """Step d, in which the prediction was multiplied by factor (batch,)."""
        numbers = self._steps[d]
        factor = numbers.sample + numbers.prediction * factor
        if self._tokens is None:
            self.squared_norm = self.squared_norm * factor.square()
            return
        self._tokens = self._tokens * factor[:, None, None].to(self._tokens.dtype)
        if numbers.noise != 0:
            self._tokens = self._tokens.add(self._noise[d], alpha=numbers.noise)
        self.squared_norm = _squared_norm(self._tokens)


def _squared_norm(tokens: Tensor) -> Tensor:
    return tokens.float().square().sum(dim=(1, 2))


def _check(
    x: Tensor,
    condition: Tensor,
    time_embeddings: Tensor,
    weights: HeadWeights,
    steps: Sequence[StepCoefficients],
    noise: Tensor | None,
) -> None:
    def require(tensor: Tensor, name: str, *shape: int) -> None:
        if tuple(tensor.shape) != shape:
            raise ValueError(f"denoise: {name} must be {shape}, got {tuple(tensor.shape)}")

    if x.dim() != 3 or not steps:
        raise ValueError("denoise: x must be (batch, tokens, token_dim), and steps not empty")
    if condition.dim() != 4 or not 1 <= condition.shape[0] <= 3:
        raise ValueError(
            "denoise: condition must be (1 to 3 passes, batch, tokens, width), got "
            f"{tuple(condition.shape)}"
        )
    width = weights.width
    require(condition[0], "a pass of condition", *x.shape[:2], width)
    require(time_embeddings, "time_embeddings", len(steps), width)
    require(weights.embed[0], "the weight of embed", width, x.shape[2])
    if len(weights.modulations) != len(weights.blocks) + 1:
        raise ValueError("denoise: every block needs a modulation, and the head another one")
    if any(step.noise != 0 for step in steps):
        if noise is None:
            raise ValueError("denoise: these steps add noise; give it")
        require(noise, "noise", len(steps), *x.shape)
        if (noise.dtype, noise.device) != (x.dtype, x.device):  # kernels get its address alone
            raise ValueError(
                f"denoise: noise must be {x.dtype} on {x.device} as x, got {noise.dtype} on "
                f"{noise.device}"
            )
