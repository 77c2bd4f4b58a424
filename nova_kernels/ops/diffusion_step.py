"""One denoise step after the diffusion MLP: guidance, scheduler update and noise in one pass.

    x <- sample * x + prediction * guided(predictions) + noise_scale * noise

is every scheduler's step (DDPM, arXiv 2006.11239; Euler steps of flow matching, arXiv 2210.02747).
Guidance is classifier-free (arXiv 2207.12598) with two passes [conditional, unconditional], or with
a third one for the image; it may be renormalised. For sampling: there is no gradient.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nova_kernels.dispatch import Op, define, new_rows, through_operator

OP = Op("diffusion_step")


@dataclass(frozen=True)
class StepCoefficients:
    """The numbers of one denoise step.

    Attributes:
        sample, prediction, noise: of the scheduler's update.
        guidance: scale g of classifier-free guidance.
        image_guidance: scale of the third pass.
        renorm: below 1, the guided prediction is brought towards the conditional one's norm, by a
            factor of at least this.
    """

    sample: float
    prediction: float
    noise: float = 0.0
    guidance: float = 1.0
    image_guidance: float = 0.0
    renorm: float = 1.0

    def as_list(self) -> list[float]:
        """All of them in order; by name, since torch.compile cannot trace `vars` of a dataclass."""
        guidance = [self.guidance, self.image_guidance, self.renorm]
        return [self.sample, self.prediction, self.noise, *guidance]


def diffusion_step(
    x: Tensor,
    predictions: Tensor,
    step: StepCoefficients,
    *,
    noise: Tensor | None = None,
    outside: Tensor | None = None,
    mask: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Noisy tokens -> tokens after one denoise step.

    With two passes the guided prediction is uncond + g (cond - uncond). With three,
    renormalised(uncond + g (cond - image)) + image_guidance (image - uncond).

    Args:
        x: (batch, tokens, token_dim), the tokens of a set (packed) or of a frame.
        predictions: (passes, batch, tokens, token_dim), 1, 2 or 3 passes: [cond, uncond, image].
        step: the numbers of this step.
        noise: like x, where `step.noise` is not 0.
        outside: (batch,) float32, squared norm of what counts in the norms of renormalisation and
            is not in x; None: nothing.
        mask: (batch, tokens) bool: tokens where it is False stay as they are and count in no norm.
        backend: see `nova_kernels.dispatch`.

    Returns:
        x after the step, and the factors (batch,) float32 of renormalisation, 1 without it.

    Raises:
        ValueError: shapes or dtypes that do not fit, missing noise, or an unknown backend.
        BackendError: the backend cannot run on these tensors.
    """
    _check(x, predictions, step, noise, outside, mask)
    noise = noise if step.noise != 0 else None
    given = [t for t in (x, predictions, noise, outside, mask) if t is not None]
    chosen = OP.choose(backend, *given)
    if chosen == "reference":
        return reference(x, predictions, step, noise, outside, mask)
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        raise ValueError("diffusion_step has no gradient; call it under torch.no_grad()")
    arguments = (x, predictions, noise, outside, mask, step.as_list(), chosen)
    if through_operator():
        return torch.ops.nova_kernels.diffusion_step(*arguments)
    return _step(*arguments)


def reference(
    x: Tensor,
    predictions: Tensor,
    step: StepCoefficients,
    noise: Tensor | None = None,
    outside: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The op in plain torch; arguments as those of `diffusion_step`."""
    cond, *others = predictions
    factor = torch.ones(len(x), dtype=torch.float32, device=x.device)
    guided = cond
    if others:
        uncond, image = others[0], others[-1]
        if len(others) == 1:
            guided = torch.lerp(uncond, cond, step.guidance)
        else:
            guided = uncond + step.guidance * (cond - image)
        if step.renorm < 1:
            factor = _norm(cond, outside, mask) / _norm(guided, outside, mask)
            factor = factor.clamp(step.renorm, 1.0)
            guided = guided * factor[:, None, None].to(guided.dtype)
        if len(others) == 2:
            guided = guided + step.image_guidance * (image - uncond)
    result = (x if step.sample == 1 else x * step.sample).add(guided, alpha=step.prediction)
    if noise is not None:
        result = result.add(noise, alpha=step.noise)
    result = result if mask is None else torch.where(mask[..., None], result, x)
    return result, factor.float()


def _norm(x: Tensor, outside: Tensor | None, mask: Tensor | None) -> Tensor:
    # In float32 at least: squares overflow float16.
    squares = x.to(torch.promote_types(x.dtype, torch.float32)).square()
    total = (squares if mask is None else squares * mask[..., None]).sum(dim=(1, 2))
    return torch.sqrt(total if outside is None else total + outside)


def _check(
    x: Tensor,
    predictions: Tensor,
    step: StepCoefficients,
    noise: Tensor | None,
    outside: Tensor | None,
    mask: Tensor | None,
) -> None:
    def require(condition: bool, message: str) -> None:
        if not condition:
            raise ValueError(f"diffusion_step: {message}")

    shape = tuple(x.shape)
    require(x.dim() == 3, f"x must be (batch, tokens, token_dim), got {shape}")
    require(x.is_floating_point(), f"x must have a floating dtype, got {x.dtype}")
    require(
        predictions.shape[1:] == x.shape and 1 <= predictions.shape[0] <= 3,
        f"predictions must be (1 to 3, {', '.join(map(str, shape))}), "
        f"got {tuple(predictions.shape)}",
    )
    require(
        predictions.dtype == x.dtype,
        f"predictions have dtype {predictions.dtype}, x has {x.dtype}",
    )
    require(step.noise == 0 or noise is not None, "this step adds noise; give it")
    if noise is not None:
        fits = noise.shape == x.shape and noise.dtype == x.dtype
        require(fits, f"noise must be like x, got {tuple(noise.shape)} of {noise.dtype}")
    if outside is not None:
        fits = outside.shape == x.shape[:1] and outside.dtype == torch.float32
        given = f"{tuple(outside.shape)} of {outside.dtype}"
        require(fits, f"outside must be ({shape[0]},) of float32, got {given}")
    if mask is not None:
        fits = mask.shape == x.shape[:2] and mask.dtype == torch.bool
        require(fits, f"mask must be {shape[:2]} of bool, got {tuple(mask.shape)} of {mask.dtype}")


def _step(
    x: Tensor,
    predictions: Tensor,
    noise: Tensor | None,
    outside: Tensor | None,
    mask: Tensor | None,
    numbers: list[float],
    backend: str,
) -> tuple[Tensor, Tensor]:
    step = StepCoefficients(*numbers)
    return OP.module(backend).step(x, predictions, step, noise, outside, mask)


define(
    "diffusion_step(Tensor x, Tensor predictions, Tensor? noise, Tensor? outside, Tensor? mask,"
    " float[] numbers, str backend) -> (Tensor, Tensor)",
    _step,
    lambda x, *_: (new_rows(x), x.new_empty(x.shape[0], dtype=torch.float32)),
)
