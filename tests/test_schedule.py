"""Set sizes, and scheduler tables against diffusers' schedulers."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nova.errors import ConfigError, InputError
from nova.schedule import (
    DDPMConfig,
    FlowMatchConfig,
    scheduler_from_dict,
    scheduler_to_dict,
    set_sizes,
)


@given(st.integers(1, 2000), st.integers(1, 3000))
@settings(max_examples=200, deadline=None)
def test_sets_cover_every_token_once(num_tokens, num_steps):
    sizes = set_sizes(num_tokens, num_steps)
    assert sum(sizes) == num_tokens
    assert min(sizes) > 0 and len(sizes) <= num_steps


def test_set_sizes_of_the_released_video_model():
    sizes = set_sizes(1440, 64)
    assert len(sizes) == 63 and min(sizes) == 2 and max(sizes) == 36


def test_more_steps_than_tokens():
    assert set_sizes(3, 10) == [1, 1, 1]


@pytest.mark.parametrize("steps", [1, 4, 25])
@pytest.mark.parametrize("shift", [None, 3.0])
def test_flow_matching_is_an_euler_integration_to_zero(steps, shift):
    schedule = FlowMatchConfig().schedule(steps, shift)
    first = 1.0 if steps == 1 else schedule.timesteps[0] / 1000
    assert math.isclose(sum(schedule.prediction), -first, rel_tol=1e-6)
    assert not any(schedule.noise) and set(schedule.sample) == {1.0}
    assert list(schedule.timesteps) == sorted(schedule.timesteps, reverse=True)


def test_config_shift_applies_to_both_tables():
    """A shift in the config has moved the table's ends before the steps are laid out."""
    shifted = FlowMatchConfig(shift=3.0)
    schedule = shifted.schedule(10)
    low = 3 * 0.001 / (1 + 2 * 0.001)
    assert math.isclose(schedule.timesteps[-1], 1000 * 3 * low / (1 + 2 * low), rel_tol=1e-5)
    timesteps, sigmas = shifted.training_tables()
    torch.testing.assert_close(sigmas[-1].item(), low)
    torch.testing.assert_close(timesteps, 1000 * sigmas)


OPTIONS = [
    {"beta_schedule": schedule, "prediction_type": prediction}
    for schedule in ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")
    for prediction in ("epsilon", "sample", "v_prediction")
] + [
    {"timestep_spacing": spacing, "variance_type": variance}
    for spacing in ("leading", "linspace", "trailing")
    for variance in ("fixed_small", "fixed_small_log", "fixed_large")
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o.values()))
@pytest.mark.parametrize("steps", [4, 25])
def test_ddpm_table_equals_diffusers(options, steps, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    reference = diffusers.DDPMScheduler(clip_sample=False, **options)
    reference.set_timesteps(steps)
    # Newer diffusers step to the next timestep of the table; NOVA's scheduler steps by 1000 // D.
    monkeypatch.setattr(reference, "previous_timestep", lambda t: t - 1000 // steps)
    schedule = DDPMConfig(**options).schedule(steps)
    assert list(schedule.timesteps) == [float(t) for t in reference.timesteps]
    generator = torch.Generator().manual_seed(0)
    for d, t in enumerate(reference.timesteps):
        x, prediction = torch.randn(2, 1, 2, 8, 8, generator=generator)
        torch.manual_seed(d)
        expected = reference.step(prediction, t, x).prev_sample
        torch.manual_seed(d)
        noise = torch.randn(x.shape) if t > 0 else torch.zeros_like(x)
        a, b, n = schedule.sample[d], schedule.prediction[d], schedule.noise[d]
        torch.testing.assert_close(
            a * x + b * prediction + n * noise, expected, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_every_number_of_ddpm_steps_has_the_timesteps_of_diffusers(spacing):
    diffusers = pytest.importorskip("diffusers")
    reference = diffusers.DDPMScheduler(timestep_spacing=spacing)
    for steps in range(1, 129):  # with 48, trailing, a time is halfway between two numbers
        reference.set_timesteps(steps)
        timesteps = DDPMConfig(timestep_spacing=spacing).schedule(steps).timesteps
        assert list(timesteps) == reference.timesteps.tolist()[:steps]


def test_ddpm_draws_no_noise_at_time_zero():
    schedule = DDPMConfig().schedule(10)
    assert schedule.noise[-1] == 0.0 and all(n > 0 for n in schedule.noise[:-1])


FLOW_CLASS, DDPM_CLASS = "FlowMatchEulerDiscreteScheduler", "DDPMScheduler"


@pytest.mark.parametrize(
    "name, key, value",
    [
        *((FLOW_CLASS, "shift", value) for value in (None, "x", -1, float("nan"), True)),
        *((FLOW_CLASS, "num_train_timesteps", value) for value in (0, -1, 1.5, "1000")),
        *((DDPM_CLASS, "num_train_timesteps", value) for value in (0, "1000")),
        *((DDPM_CLASS, "beta_start", value) for value in (None, 0, "0.1")),
        (DDPM_CLASS, "beta_end", 2),
        *((DDPM_CLASS, "steps_offset", value) for value in (1.5, -5)),
        *((DDPM_CLASS, "trained_betas", value) for value in (5, [0.1, 0.2], [0.1] * 999 + ["x"])),
    ],
)
def test_numbers_that_make_no_scheduler(name, key, value):
    with pytest.raises(ConfigError, match=f"scheduler config: {key}"):
        scheduler_from_dict({"_class_name": name, key: value})


@pytest.mark.parametrize(
    "config, message",
    [
        (DDPMConfig(beta_end=0.3), "leave no signal at timestep 960"),
        (DDPMConfig(beta_start=1e-9), "leave no noise at timestep 0"),
        (DDPMConfig(num_train_timesteps=50, trained_betas=(0.9,) * 50), "no signal at timestep 48"),
    ],
)
def test_betas_that_cannot_be_sampled_with(config, message):
    with pytest.raises(ConfigError, match=message):
        config.schedule(25)


@pytest.mark.parametrize("config", [FlowMatchConfig(shift=2.0), DDPMConfig(steps_offset=1)])
def test_scheduler_files_round_trip(config):
    assert scheduler_from_dict(scheduler_to_dict(config)) == config
    assert scheduler_from_dict(scheduler_to_dict(config), kind="noise") == config


def test_numbers_of_numpy_become_those_of_files():
    configs = [
        FlowMatchConfig(num_train_timesteps=np.int64(10), shift=np.float32(2)),
        DDPMConfig(num_train_timesteps=np.int64(2), trained_betas=tuple(np.full(2, 0.5))),
        DDPMConfig(beta_start=np.float64(0.25), steps_offset=np.int32(1)),
    ]
    for config in configs:
        saved = json.loads(json.dumps(scheduler_to_dict(config)))
        assert scheduler_from_dict(saved) == config


def test_sampling_and_training_schedulers_may_differ():
    config = {"_sample_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 1.5}
    config.update(_noise_class_name="DDPMScheduler", beta_schedule="linear", clip_sample=True)
    assert scheduler_from_dict(config) == FlowMatchConfig(shift=1.5)
    assert scheduler_from_dict(config, kind="noise") == DDPMConfig()


@pytest.mark.parametrize(
    "config, message",
    [
        ({"_class_name": "EulerDiscreteScheduler"}, "scheduler class"),
        ({"_class_name": ["DDPMScheduler"]}, "scheduler class"),
        ({"_class_name": "DDPMScheduler", "beta_schedule": "cubic"}, "beta_schedule"),
        ({"_class_name": "DDPMScheduler", "thresholding": True}, "thresholding=True"),
        ({"_class_name": "DDPMScheduler", "rescale_betas_zero_snr": True}, "rescale_betas"),
        *(
            ({"_class_name": "FlowMatchEulerDiscreteScheduler", key: True}, f"{key}=True is not")
            for key in (
                "use_dynamic_shifting",
                "invert_sigmas",
                "shift_terminal",
                "use_karras_sigmas",
                "use_exponential_sigmas",
                "use_beta_sigmas",
                "stochastic_sampling",
            )
        ),
        ({"_class_name": "DDPMScheduler", "variance": 1}, "unknown key"),
    ],
)
def test_bad_scheduler_config(config, message):
    with pytest.raises(ConfigError, match=message):
        scheduler_from_dict(config)


def test_bad_step_counts():
    with pytest.raises(InputError, match="at least 1"):
        set_sizes(10, 0)
    for config, steps in itertools.product((FlowMatchConfig(), DDPMConfig()), (0, 2.5, "2")):
        with pytest.raises(InputError, match="num_diffusion_steps must be a whole number"):
            config.schedule(steps)
    with pytest.raises(InputError, match="at most 1000"):
        DDPMConfig().schedule(1001)
    with pytest.raises(InputError, match="flow_shift"):
        DDPMConfig().schedule(10, shift=2.0)
    with pytest.raises(InputError, match="positive"):
        FlowMatchConfig().schedule(10, shift=0.0)
