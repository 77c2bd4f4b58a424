"""Classifier-free guidance: its settings, and how many passes run. `diffusion_step` combines."""

from dataclasses import dataclass

from .errors import InputError
from .numeric import is_finite_number


@dataclass(frozen=True)
class Guidance:
    """Settings of classifier-free guidance.

    Attributes:
        scale: g; above 1 the encoders run on [conditional, unconditional].
        min_scale: g of the first autoregressive steps grows linearly from here; None: constant.
        trunc: denoise steps with a timestep below run the conditional pass alone.
        renorm: below 1, the guided prediction's norm is brought towards the conditional one's,
            by a factor of at least this.
        image_scale: above 0, a third pass [.., image]: no text, but the frames so far.

    Raises:
        InputError: a value that is not finite or out of range, or an `image_scale` where `scale`
            is not above 1.
    """

    scale: float = 5.0
    min_scale: float | None = None
    trunc: float = 0.0
    renorm: float = 1.0
    image_scale: float = 0.0

    def __post_init__(self) -> None:
        for name, value in dict(vars(self)).items():
            if value is None:
                continue
            if not is_finite_number(value):
                raise InputError(f"guidance {name} must be a finite number, got {value!r}")
            object.__setattr__(self, name, float(value))  # NumPy's are taken too
        if self.image_scale < 0:
            raise InputError(f"image_guidance_scale must be 0 or above, got {self.image_scale}")
        if self.image_scale > 0 and self.scale <= 1:
            raise InputError("image_guidance_scale needs a guidance_scale above 1")
        if self.renorm < 0:
            raise InputError(f"guidance_renorm must be 0 or above, got {self.renorm}")

    @property
    def passes(self) -> int:
        """Encoder passes: 1, 2 or 3."""
        if self.scale <= 1:
            return 1
        return 3 if self.image_scale > 0 else 2

    @property
    def renormalises(self) -> bool:
        return self.passes > 1 and self.renorm < 1

    def scale_at(self, step: int, num_steps: int) -> float:
        """g of autoregressive step `step` of `num_steps`."""
        if self.min_scale is None:
            return self.scale
        return self.min_scale + (self.scale - self.min_scale) * (step + 1) / num_steps

    def guided_steps(self, timesteps: tuple[float, ...]) -> int:
        """How many denoise steps, from the first on, run all passes."""
        if self.passes == 1:
            return 0
        below = (i for i, t in enumerate(timesteps) if t < self.trunc)
        return next(below, len(timesteps))
