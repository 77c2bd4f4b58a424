"""Set sizes of the autoregressive steps, and diffusion schedulers as a table of numbers a step."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import ConfigError, InputError
from .numeric import check_whole, checked_count, is_finite_number

# Of tables: a caller may have made another dtype and device torch's defaults.
_FLOAT32 = {"dtype": torch.float32, "device": "cpu"}


def set_sizes(num_tokens: int, num_steps: int) -> list[int]:
    """Tokens revealed by every autoregressive step: a cosine schedule; empty steps are left out.

    `num_steps` may exceed `num_tokens`.
    """
    if num_steps < 1:
        raise InputError(f"num_inference_steps must be at least 1, got {num_steps}")
    masked = [round(math.cos(0.5 * math.pi * i / num_steps) * num_tokens) for i in range(num_steps)]
    masked.append(0)
    sizes = [before - after for before, after in zip(masked, masked[1:], strict=False)]
    return [size for size in sizes if size > 0]


@dataclass(frozen=True)
class DiffusionSchedule:
    """x <- sample[d] * x + prediction[d] * prediction + noise[d] * normal noise, d = 0..D-1.

    `timesteps` (D,) are what the diffusion MLP is told, in 0..1000 and descending.
    """

    timesteps: tuple[float, ...]
    sample: tuple[float, ...]
    prediction: tuple[float, ...]
    noise: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.timesteps)


@dataclass(frozen=True)
class FlowMatchConfig:
    """Flow matching, Euler steps. `shift` s maps sigma to s sigma / (1 + (s - 1) sigma).

    Raises:
        ConfigError: values that are out of range.
    """

    num_train_timesteps: int = 1000
    shift: float = 1.0

    def __post_init__(self) -> None:
        _check_whole(self, "num_train_timesteps", least=1)
        _check_numbers(self, "shift", above=0)

    def schedule(self, num_steps: int, shift: float | None = None) -> DiffusionSchedule:
        """The table of `num_steps` steps; `shift` replaces the config's for sampling only.

        Raises:
            InputError: `num_steps` is no whole number of at least 1, or the shift is not above 0.
        """
        num_steps = checked_count("num_diffusion_steps", num_steps, least=1)
        shift = self.shift if shift is None else shift
        if not shift > 0:
            raise InputError(f"flow_shift must be positive, got {shift}")
        # The ends of the training table carry the config's own shift already.
        first, last = (_shifted(s, self.shift) for s in (1.0, 1.0 / self.num_train_timesteps))
        span = (last - first) / max(num_steps - 1, 1)
        sigmas = [_shifted(first + span * i, shift) for i in range(num_steps)]
        steps = [b - a for a, b in zip(sigmas, [*sigmas[1:], 0.0], strict=True)]
        return DiffusionSchedule(
            # float32, as the reference has them: guidance_trunc compares with these.
            timesteps=tuple((torch.tensor(sigmas, **_FLOAT32) * self.num_train_timesteps).tolist()),
            sample=(1.0,) * num_steps,
            prediction=tuple(steps),
            noise=(0.0,) * num_steps,
        )

    def training_tables(self) -> tuple[Tensor, Tensor]:
        """Timestep and sigma (num_train_timesteps,) float32, descending, as training draws them."""
        grid = torch.arange(self.num_train_timesteps, 0, -1, **_FLOAT32) / self.num_train_timesteps
        sigmas = _shifted(grid, self.shift)
        return sigmas * self.num_train_timesteps, sigmas


def _shifted(sigma, shift: float):
    return shift * sigma / (1 + (shift - 1) * sigma)


@dataclass(frozen=True)
class DDPMConfig:
    """DDPM (Ho et al., arXiv 2006.11239), with the options that diffusers' DDPMScheduler has.

    Samples are never clipped.

    Raises:
        ConfigError: values that are out of range, or an option that diffusers does not have.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    prediction_type: str = "epsilon"
    variance_type: str = "fixed_small"
    timestep_spacing: str = "leading"
    steps_offset: int = 0
    trained_betas: tuple[float, ...] | None = field(default=None, repr=False)

    CHOICES = {
        "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"),
        "prediction_type": ("epsilon", "sample", "v_prediction"),
        "variance_type": ("fixed_small", "fixed_small_log", "fixed_large"),
        "timestep_spacing": ("leading", "linspace", "trailing"),
    }

    def __post_init__(self) -> None:
        for name, choices in self.CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(
                    f"scheduler config: {name} must be one of {choices}, "
                    f"got {getattr(self, name)!r}"
                )
        _check_whole(self, "num_train_timesteps", least=1)
        _check_numbers(self, "beta_start", "beta_end", above=0, below=1)
        _check_whole(self, "steps_offset", least=0)
        if self.trained_betas is not None:
            self._check_trained_betas()

    def _check_trained_betas(self) -> None:
        if not isinstance(self.trained_betas, tuple):
            raise ConfigError(
                f"scheduler config: trained_betas must be a list, got {self.trained_betas!r}"
            )
        if len(self.trained_betas) != self.num_train_timesteps:
            raise ConfigError(
                f"scheduler config: trained_betas has {len(self.trained_betas)} values for "
                f"{self.num_train_timesteps} timesteps"
            )
        betas = tuple(_number("trained_betas", b, above=0, below=1) for b in self.trained_betas)
        object.__setattr__(self, "trained_betas", betas)

    def alphas_cumprod(self) -> Tensor:
        """(num_train_timesteps,) float32 product of 1 - beta."""
        return torch.cumprod(1.0 - self._betas(), dim=0)

    def _betas(self) -> Tensor:
        count, start, end = self.num_train_timesteps, self.beta_start, self.beta_end
        if self.trained_betas is not None:
            return torch.tensor(self.trained_betas, **_FLOAT32)
        if self.beta_schedule == "linear":
            return torch.linspace(start, end, count, **_FLOAT32)
        if self.beta_schedule == "scaled_linear":
            return torch.linspace(start**0.5, end**0.5, count, **_FLOAT32) ** 2
        if self.beta_schedule == "sigmoid":
            return torch.sigmoid(torch.linspace(-6, 6, count, **_FLOAT32)) * (end - start) + start
        # Cosine schedule of Nichol & Dhariwal (arXiv 2102.09672), betas capped at 0.999.
        bar = [math.cos((i / count + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(count + 1)]
        betas = [min(1 - b / a, 0.999) for a, b in zip(bar, bar[1:], strict=False)]
        return torch.tensor(betas, **_FLOAT32)

    def schedule(self, num_steps: int, shift: float | None = None) -> DiffusionSchedule:
        """The table of `num_steps` steps.

        Raises:
            InputError: `num_steps` is no whole number of at least 1, or above the number of
                training timesteps, or there is a flow shift.
            ConfigError: betas that leave no signal or no noise at a timestep.
        """
        num_steps = checked_count("num_diffusion_steps", num_steps, least=1)
        if shift is not None:
            raise InputError("flow_shift is for flow matching; this checkpoint samples with DDPM")
        if num_steps > self.num_train_timesteps:
            raise InputError(
                f"num_diffusion_steps must be at most {self.num_train_timesteps}, got {num_steps}"
            )
        alphas = self.alphas_cumprod().tolist()
        timesteps = self._timesteps(num_steps)
        for t in timesteps:
            if not 0 < alphas[t] < 1:
                raise ConfigError(
                    "scheduler config: its betas leave no "
                    f"{'noise' if alphas[t] else 'signal'} at timestep {t}, in float32"
                )
        stride = self.num_train_timesteps // num_steps
        rows = [
            self._step(t, alphas[t], alphas[t - stride] if t >= stride else 1.0) for t in timesteps
        ]
        sample, prediction, noise = zip(*rows, strict=True)
        return DiffusionSchedule(tuple(float(t) for t in timesteps), sample, prediction, noise)

    def _timesteps(self, num_steps: int) -> list[int]:
        count = self.num_train_timesteps
        if self.timestep_spacing == "leading":
            times = [i * (count // num_steps) + self.steps_offset for i in range(num_steps)][::-1]
        elif self.timestep_spacing == "linspace":
            # By numpy, like diffusers: between two whole numbers the last bit decides.
            times = np.linspace(0, count - 1, num_steps).round().astype(int).tolist()[::-1]
        else:
            spaced = np.arange(count, 0, -count / num_steps)[:num_steps]  # it may have one more
            times = (spaced.round().astype(int) - 1).tolist()
        return [min(t, count - 1) for t in times]

    def _step(self, t: int, bar: float, bar_before: float) -> tuple[float, float, float]:
        """(sample, prediction, noise) of the step from time t; formulas (6), (7) of DDPM."""
        alpha = bar / bar_before
        beta = 1 - alpha
        clean = bar_before**0.5 * beta / (1 - bar)
        current = alpha**0.5 * (1 - bar_before) / (1 - bar)
        # The clean sample is from_sample * x + from_prediction * prediction.
        from_sample, from_prediction = {
            "epsilon": (bar**-0.5, -(((1 - bar) / bar) ** 0.5)),
            "sample": (0.0, 1.0),
            "v_prediction": (bar**0.5, -((1 - bar) ** 0.5)),
        }[self.prediction_type]
        variance = max((1 - bar_before) / (1 - bar) * beta, 1e-20)
        if self.variance_type == "fixed_large":
            variance = beta
        noise = variance**0.5 if t > 0 else 0.0
        return current + clean * from_sample, clean * from_prediction, noise


SchedulerConfig = FlowMatchConfig | DDPMConfig

_CLASSES: dict[str, type] = {
    "FlowMatchEulerDiscreteScheduler": FlowMatchConfig,
    "DDPMScheduler": DDPMConfig,
}
# Keys that diffusers writes; a value other than the one here would change the result.
_FIXED_VALUES: dict[str, tuple] = {
    "use_dynamic_shifting": (False, None),
    "thresholding": (False, None),
    "rescale_betas_zero_snr": (False, 0, None),
    "invert_sigmas": (False, None),
    "shift_terminal": (None,),
    "use_karras_sigmas": (False, None),
    "use_exponential_sigmas": (False, None),
    "use_beta_sigmas": (False, None),
    "stochastic_sampling": (False, None),
}
_IGNORED_KEYS = {
    "clip_sample",  # NOVA never clips, whatever the file says
    "clip_sample_range",
    "sample_max_value",
    "dynamic_thresholding_ratio",
    "base_shift",
    "max_shift",
    "base_image_seq_len",
    "max_image_seq_len",
    "time_shift_type",
}


def scheduler_from_dict(config: Mapping[str, Any], kind: str = "sample") -> SchedulerConfig:
    """Read scheduler/scheduler_config.json.

    Args:
        kind: "sample" or "noise": the reference names a class for sampling and one for training.

    Raises:
        ConfigError: unknown class, key or value.
    """
    name = config.get(f"_{kind}_class_name") or config.get("_class_name") or config.get("class")
    if not isinstance(name, str) or name not in _CLASSES:
        raise ConfigError(f"scheduler class must be one of {sorted(_CLASSES)}, got {name!r}")
    scheduler_class = _CLASSES[name]
    fields = set(scheduler_class.__dataclass_fields__)
    others = set().union(*(set(c.__dataclass_fields__) for c in _CLASSES.values())) - fields
    values = {}
    for key, value in config.items():
        if key.startswith("_") or key == "class" or key in _IGNORED_KEYS or key in others:
            continue
        if key in _FIXED_VALUES:
            if value not in _FIXED_VALUES[key]:
                raise ConfigError(f"scheduler config: {key}={value!r} is not supported by NOVA")
        elif key not in fields:
            raise ConfigError(f"scheduler config has an unknown key {key!r} for {name}")
        else:
            values[key] = tuple(value) if isinstance(value, list) else value
    return scheduler_class(**values)


def scheduler_to_dict(config: SchedulerConfig) -> dict[str, Any]:
    """scheduler_config.json of one scheduler that serves sampling and training."""
    name = next(name for name, cls in _CLASSES.items() if isinstance(config, cls))
    classes = {"_class_name": name, "_sample_class_name": name, "_noise_class_name": name}
    return {**classes, **vars(config)}


def _check_whole(config: Any, name: str, *, least: int) -> None:
    try:
        check_whole(config, name, least=least)
    except InputError as error:
        raise ConfigError(f"scheduler config: {error}") from None


def _check_numbers(config: Any, *names: str, above: float, below: float = math.inf) -> None:
    for name in names:
        number = _number(name, getattr(config, name), above=above, below=below)
        object.__setattr__(config, name, number)


def _number(name: str, value: Any, *, above: float, below: float) -> float:
    """As Python's, which files can hold."""
    if not (is_finite_number(value) and above < value < below):
        limits = f"above {above}" + ("" if below == math.inf else f" and below {below}")
        raise ConfigError(f"scheduler config: {name} must be a number {limits}, got {value!r}")
    return float(value)
