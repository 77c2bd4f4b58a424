"""The denoise loop: D steps of the diffusion MLP for the tokens of one set."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .guidance import Guidance, guided_with_renorm
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


def denoise(
    head: PreparedHead,
    z: Tensor,
    noisy: NoisyTokens,
    *,
    schedule: DiffusionSchedule,
    guidance: Guidance,
    scale: float,
) -> Tensor:
    """The denoise loop for the tokens of one set.

    Args:
        z: (passes * B, n, E) image encoder output for the set.
        noisy: where the noise comes from.
        scale: guidance scale of this autoregressive step.

    Returns:
        (B, n, token_dim) clean tokens.
    """
    x, get_outside = noisy.draw()
    batch, size, token_dim = x.shape
    outside = OutsideTokens(get_outside(), schedule) if guidance.renormalises else None
    condition = head.condition(z.flatten(0, 1))
    guided = guidance.guided_steps(schedule.timesteps)
    phases = ((0, guided, guidance.passes), (guided, len(schedule), 1))
    x = x.flatten(0, 1)
    for first, last, passes in phases:
        rows = passes * batch * size
        chunk = head.steps_per_chunk(rows)
        for start in range(first, last, chunk):
            stop = min(start + chunk, last)
            vectors = head.modulate(condition[:rows], start, stop, passes)
            for d in range(start, stop):
                predictions = head.predict(x, vectors[d - start])
                factor = None
                if passes > 1 and outside is not None:
                    shaped = predictions.unflatten(1, (batch, size))
                    prediction, factor = guided_with_renorm(
                        shaped, outside.squared_norm(), guidance, scale
                    )
                    prediction = prediction.flatten(0, 1)
                else:
                    prediction = _combine(predictions, guidance, scale)
                a, b, n = schedule.sample[d], schedule.prediction[d], schedule.noise[d]
                x = (x if a == 1.0 else x * a).add(prediction, alpha=b)
                fresh = None
                if n != 0.0:
                    inside, fresh = noisy.draw()
                    x.add_(inside.flatten(0, 1), alpha=n)
                if factor is not None:
                    outside.step(a + b * factor, n, fresh)
    return x.view(batch, size, token_dim)


def _combine(predictions: Tensor, guidance: Guidance, scale: float) -> Tensor:
    """(passes, rows, token_dim) -> guided prediction (rows, token_dim)."""
    if len(predictions) == 1:
        return predictions[0]
    if len(predictions) == 2:
        return torch.lerp(predictions[1], predictions[0], scale)
    cond, uncond, image = predictions
    return uncond + scale * (cond - image) + guidance.image_scale * (image - uncond)


class OutsideTokens:
    """Noisy tokens outside the set, which guidance renormalisation counts in its norms.

    They evolve as x <- f x + n noise with one factor f a sample, so without noise their squared
    norm is all that must be known.

    Args:
        tokens: (B, N - n, token_dim) at the start.
    """

    def __init__(self, tokens: Tensor, schedule: DiffusionSchedule):
        self._squared_norm = tokens.float().square().sum(dim=(1, 2))
        self._tokens = None if schedule.is_deterministic else tokens

    def squared_norm(self) -> Tensor:
        """(B,) float32."""
        return self._squared_norm

    def step(self, factor: Tensor, noise_scale: float, fresh: Callable | None) -> None:
        """One denoise step, with the (B,) factor of x and this step's noise, if any."""
        if self._tokens is None:
            self._squared_norm = self._squared_norm * factor.float().square()
            return
        self._tokens = self._tokens * factor[:, None, None].to(self._tokens.dtype)
        if fresh is not None:
            self._tokens = self._tokens.add(fresh(), alpha=noise_scale)
        self._squared_norm = self._tokens.float().square().sum(dim=(1, 2))
