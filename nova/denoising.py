"""The denoise loop of one set, D steps of the diffusion MLP, and the noise that it starts from."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import nova_kernels

from .guidance import Guidance
from .head import PreparedHead
from .layers import patchify
from .noise import NoiseSource
from .schedule import DiffusionSchedule
from .token_order import TokenOrder


@dataclass(frozen=True)
class NoisyTokens:
    """Draws a whole noisy frame, as the reference does, and picks the set's tokens from it."""

    noise: NoiseSource
    order: TokenOrder
    start: int
    stop: int
    latent_shape: tuple[int, int, int]
    patch_size: int

    def draw(self) -> tuple[Tensor, Callable[[], Tensor]]:
        """Tokens of the set (B, n, token_dim), and how to get those outside (B, N - n, ...)."""
        raster = patchify(self.noise.normal(*self.latent_shape), self.patch_size)
        inside = self.order.select(raster, self.start, self.stop)
        return inside, lambda: self.order.outside(raster, self.start, self.stop)


@dataclass(frozen=True)
class SetNoise:
    """All that is random in the denoise loop of a set of n tokens.

    Attributes:
        x: (B, n, token_dim) the noise that it starts from.
        noise: (D, B, n, token_dim), where steps add noise.
        outside: the other tokens, for renormalised guidance.
    """

    x: Tensor
    noise: Tensor | None
    outside: nova_kernels.Outside | None

    @classmethod
    def draw(
        cls, noisy: NoisyTokens, schedule: DiffusionSchedule, guidance: Guidance
    ) -> "SetNoise":
        """Draw it, in the reference's order."""
        x, get_outside = noisy.draw()
        # Steps that add noise draw it in their order, as the reference does.
        drawn = {d: noisy.draw() for d, scale in enumerate(schedule.noise) if scale != 0}
        num_steps = len(schedule.noise)
        noise = _of_all_steps({d: inside for d, (inside, _) in drawn.items()}, num_steps)
        outside = None
        if guidance.renormalises:
            fresh = {d: get_fresh() for d, (_, get_fresh) in drawn.items()}
            outside = nova_kernels.Outside(get_outside(), _of_all_steps(fresh, num_steps))
        return cls(x, noise, outside)

    def map(self, function: Callable[[Tensor], Tensor]) -> "SetNoise":
        """The same with `function` of every tensor."""

        def apply(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else function(tensor)

        outside = self.outside
        if outside is not None:
            outside = nova_kernels.Outside(apply(outside.tokens), apply(outside.noise))
        return SetNoise(apply(self.x), apply(self.noise), outside)


def denoise(
    head: PreparedHead,
    z: Tensor,
    drawn: SetNoise,
    *,
    schedule: DiffusionSchedule,
    guidance: Guidance,
    scale: float,
) -> Tensor:
    """The denoise loop for the tokens of one set.

    Args:
        z: (passes * B, n, E) image encoder output for the set.
        drawn: the noise.
        scale: guidance scale of this autoregressive step.

    Returns:
        (B, n, token_dim) clean tokens.
    """
    steps = [
        nova_kernels.StepCoefficients(
            *numbers,
            guidance=scale,
            image_guidance=guidance.image_scale,
            renorm=guidance.renorm if guidance.renormalises else 1.0,
        )
        for numbers in zip(schedule.sample, schedule.prediction, schedule.noise, strict=True)
    ]
    return nova_kernels.denoise(
        drawn.x,
        head.condition(z).unflatten(0, (-1, len(drawn.x))),
        head.time_embeddings,
        head.weights,
        steps,
        guided_steps=guidance.guided_steps(schedule.timesteps),
        noise=drawn.noise,
        outside=drawn.outside,
        backend=head.backend,
    )


def _of_all_steps(noise: dict[int, Tensor], num_steps: int) -> Tensor | None:
    """Noise by step -> (num_steps, ...), zeros where a step adds none; None if none does."""
    if not noise:
        return None
    zeros = torch.zeros_like(next(iter(noise.values())))
    return torch.stack([noise.get(step, zeros) for step in range(num_steps)])
