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
launch (docs/denoise.md); in C++, for CPUs, they are one call. These two are what torch.compile sees
as the operator `torch.ops.nova_kernels.denoise`; of a sequence it sees the parts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from nova_kernels.autocast import without_autocast
from nova_kernels.checks import require_shape
from nova_kernels.dispatch import (
    OTHERWISE,
    Op,
    define,
    define_no_gradient,
    has_tangent,
    new_rows,
    promoted,
    requested,
    through_operator,
)
from nova_kernels.head_weights import HeadWeights
from nova_kernels.ops.diffusion_step import StepCoefficients, diffusion_step
from nova_kernels.ops.residual_norm import residual_norm
from nova_kernels.ops.scale_shift import scale_shift

OP = Op("denoise", implementations=("cuda", "triton", "cpp"), verified=frozenset({"cuda", "cpp"}))
ADA_NORM_EPS = 1e-6
NORM_EPS = 1e-5
# Modulation vectors are made for as many steps at once as fit this many bytes.
MODULATION_BUDGET = 256 * 2**20
# What a launch of the CUDA kernel takes (csrc/arguments.h).
MAX_STEPS_PER_LAUNCH = 64
# Implementations that take all steps at once, where they take a call.
WHOLE_LOOPS = ("cuda", "cpp")


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

    Autocast is passed over: the loop computes in the dtype of x.

    Args:
        x: (batch, tokens, token_dim) noise.
        condition: (passes, batch, tokens, width), 1, 2 or 3 passes: what the encoder says of the
            tokens, projected to the MLP's width.
        time_embeddings: (len(steps), width). Its sum with condition must have the dtype of x;
            one of them alone may have a lower one.
        weights: of the MLP, in the dtype of x.
        steps: the numbers of every step.
        guided_steps: how many steps, from the first on, run all passes; later ones run the first
            pass alone, without guidance. None: all.
        noise: (len(steps), batch, tokens, token_dim), where steps add noise.
        outside: for renormalised guidance; None: nothing counts but x.
        backend: see `nova_kernels.dispatch`. "cuda" is one launch for what it takes
            (`cuda_kernels.denoise.obstacle`), else a sequence, in CUDA as far as that goes; "cpp"
            is one call for what it takes (`cpp_kernels.denoise.obstacle`), else the reference.
            "auto" and "cpp" run the reference where a gradient is wanted.

    Returns:
        (batch, tokens, token_dim).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a gradient that a GPU kernel does not
            have, or an unknown backend.
        BackendError: the backend cannot run on these tensors.
    """
    _check(x, condition, time_embeddings, weights, steps, guided_steps)
    if any(step.noise != 0 for step in steps):
        _check_noise(x, len(steps), noise, outside)
    else:
        noise = None
    if outside is not None:
        _check_outside(x, outside, len(steps))
    tensors = _given(x, condition, time_embeddings, weights, noise, outside)
    _check_devices(tensors)
    chosen, named = _choose(backend, x, condition, tensors)
    if guided_steps is None or condition.shape[0] == 1:
        guided_steps = len(steps)
    if chosen in WHOLE_LOOPS and through_operator():
        return torch.ops.nova_kernels.denoise(
            x,
            condition,
            time_embeddings,
            weights.tensors(),
            len(weights.blocks),
            [number for step in steps for number in step.as_list()],
            guided_steps,
            noise,
            None if outside is None else outside.tokens,
            None if outside is None else outside.noise,
            named,
        )
    # Products of autocast's dtype would fit neither the tokens nor what kernels read.
    with without_autocast(x.device):
        whole_loop = _whole_loop(chosen, x, condition, weights, steps, noise, outside)
        return _all_steps(
            x,
            condition,
            time_embeddings,
            weights,
            steps,
            guided_steps,
            noise,
            outside,
            named,
            whole_loop,
        )


def _choose(backend: str, x: Tensor, condition: Tensor, tensors: list[Tensor]) -> tuple[str, str]:
    """The implementation of the loop, and the backend for the ops where it is a sequence of them.

    Args:
        tensors: all of the call.

    Raises:
        ValueError: a gradient is wanted of a backend that has none.
    """
    named = requested(backend)
    wants_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if wants_gradient or has_tangent(*tensors):
        if named in ("triton", "cuda"):
            raise ValueError(
                f"denoise: backend {named!r} has no gradient; call it under torch.no_grad(), or "
                "with backend='reference'"
            )
        return "reference", "reference"
    chosen = OP.choose(backend, x, condition)
    # Kernels have nothing to run on where there are no tokens.
    if x.numel() == 0:
        return "reference", "reference"
    return chosen, named


def _all_steps(
    x: Tensor,
    condition: Tensor,
    time_embeddings: Tensor,
    weights: HeadWeights,
    steps: Sequence[StepCoefficients],
    guided_steps: int,
    noise: Tensor | None,
    outside: Outside | None,
    backend: str,
    whole_loop: ModuleType | None,
) -> Tensor:
    """The loop, by as many calls of `whole_loop` as modulations need, or step by step.

    Args:
        backend: of the ops of a sequence.
        others: as those of `denoise`.
    """
    # The ops of rows are written in CUDA too, a single step is not; neither is written in C++.
    rows_backend = "reference" if backend == "cpp" else backend
    step_backend = OTHERWISE.get(backend, backend)
    passes = condition.shape[0]
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
    noise: Tensor | None,
    outside: Outside | None,
) -> ModuleType | None:
    """The module whose `run` takes all steps at once; None for a sequence of launches.

    Its `linear` makes the products before the loop.
    """
    if chosen not in WHOLE_LOOPS:
        return None
    # The kernels read memory as it is, and views like `x.conj().imag` are negated when read.
    if x.is_neg() or (noise is not None and noise.is_neg()):
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
    for block, (scale, shift, gate) in zip(weights.blocks, vectors[:-1], strict=True):
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


def _given(
    x: Tensor,
    condition: Tensor,
    time_embeddings: Tensor,
    weights: HeadWeights,
    noise: Tensor | None,
    outside: Outside | None,
) -> list[Tensor]:
    """All tensors of a call."""
    tensors = [x, condition, time_embeddings, *weights.tensors()]
    optional = [noise]
    if outside is not None:
        optional += [outside.tokens, outside.noise]
    return tensors + [tensor for tensor in optional if tensor is not None]


def _check(
    x: Tensor,
    condition: Tensor,
    time_embeddings: Tensor,
    weights: HeadWeights,
    steps: Sequence[StepCoefficients],
    guided_steps: int | None,
) -> None:
    """`HeadWeights` checks itself, once, when it is made."""
    if x.dim() != 3 or not steps:
        raise ValueError("denoise: x must be (batch, tokens, token_dim), and steps not empty")
    if not x.is_floating_point():
        raise ValueError(f"denoise: x must have a floating dtype, got {x.dtype}")
    if condition.dim() != 4 or not 1 <= condition.shape[0] <= 3:
        raise ValueError(
            "denoise: condition must be (1 to 3 passes, batch, tokens, width), got "
            f"{tuple(condition.shape)}"
        )
    batch, tokens, token_dim = x.shape
    require_shape(OP.name, "condition", condition, condition.shape[0], batch, tokens, weights.width)
    require_shape(OP.name, "time_embeddings", time_embeddings, len(steps), weights.width)
    if token_dim != weights.token_dim:
        raise ValueError(
            f"denoise: x has tokens of {token_dim} values, and embed.weight takes "
            f"{weights.token_dim}"
        )
    if guided_steps is not None and not 0 <= guided_steps <= len(steps):
        raise ValueError(f"denoise: guided_steps must be 0 to {len(steps)}, got {guided_steps}")
    _check_dtypes(x, condition, time_embeddings, weights)


def _check_dtypes(
    x: Tensor, condition: Tensor, time_embeddings: Tensor, weights: HeadWeights
) -> None:
    """Matrix products take one dtype."""
    others = {str(tensor.dtype) for tensor in weights.tensors() if tensor.dtype != x.dtype}
    if others:
        raise ValueError(f"denoise: weights must be {x.dtype} as x, got {sorted(others)}")
    if promoted(condition, time_embeddings) != x.dtype:
        raise ValueError(
            f"denoise: the sum of condition and time_embeddings must be {x.dtype} as x, got "
            f"{condition.dtype} and {time_embeddings.dtype}"
        )


def _check_noise(x: Tensor, num_steps: int, noise: Tensor | None, outside: Outside | None) -> None:
    """Of steps that add noise."""
    if noise is None:
        raise ValueError("denoise: these steps add noise; give it")
    require_shape(OP.name, "noise", noise, num_steps, *x.shape)
    if (noise.dtype, noise.device) != (x.dtype, x.device):  # kernels get its address alone
        raise ValueError(
            f"denoise: noise must be {x.dtype} on {x.device} as x, got {noise.dtype} on "
            f"{noise.device}"
        )
    if outside is not None and outside.noise is None:
        raise ValueError("denoise: these steps add noise; outside needs its own")


def _check_outside(x: Tensor, outside: Outside, num_steps: int) -> None:
    batch, _, token_dim = x.shape
    shape = tuple(outside.tokens.shape)
    if len(shape) != 3 or (shape[0], shape[2]) != (batch, token_dim):
        raise ValueError(
            f"denoise: outside.tokens must be ({batch}, any number, {token_dim}), got {shape}"
        )
    if outside.noise is not None:
        require_shape(OP.name, "outside.noise", outside.noise, num_steps, *shape)


def _check_devices(tensors: list[Tensor]) -> None:
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        names = sorted(map(str, devices))
        raise ValueError(f"denoise: all tensors must be on one device, got {names}")


def _operator(
    x: Tensor,
    condition: Tensor,
    time_embeddings: Tensor,
    weights: list[Tensor],
    depth: int,
    numbers: list[float],
    guided_steps: int,
    noise: Tensor | None,
    outside_tokens: Tensor | None,
    outside_noise: Tensor | None,
    backend: str,
) -> Tensor:
    """`denoise` without classes.

    The C++ kernel packs the weights at every call, since a `HeadWeights` that remembers them is not
    handed over.

    Args:
        weights, depth: `HeadWeights.tensors()`, and the number of blocks.
        numbers: `StepCoefficients.as_list()` of all steps, one after the other.
        outside_tokens, outside_noise: of `Outside`.
        others: as those of `denoise`.

    Returns:
        As `denoise`, contiguous.
    """
    a_step = len(fields(StepCoefficients))
    starts = range(0, len(numbers), a_step)
    result = denoise(
        x,
        condition,
        time_embeddings,
        HeadWeights.of_tensors(weights, depth),
        [StepCoefficients(*numbers[start : start + a_step]) for start in starts],
        guided_steps=guided_steps,
        noise=noise,
        outside=None if outside_tokens is None else Outside(outside_tokens, outside_noise),
        backend=backend,
    )
    return result.contiguous()


define(
    "denoise(Tensor x, Tensor condition, Tensor time_embeddings, Tensor[] weights, int depth,"
    " float[] numbers, int guided_steps, Tensor? noise, Tensor? outside_tokens,"
    " Tensor? outside_noise, str backend) -> Tensor",
    _operator,
    lambda x, *_: new_rows(x),
)
define_no_gradient("denoise")
