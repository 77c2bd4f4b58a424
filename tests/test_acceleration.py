"""nova.accelerate, on a stand-in with the parameters and the interface of the reference."""

from types import SimpleNamespace

import pytest
import torch
from reference_stand_in import StandInPipeline
from small_models import SMALL, SMALL_ROTARY, small_model, small_prompts

import nova

FAST = {"num_inference_steps": 4, "num_diffusion_steps": 3, "max_latent_length": 2}


CALLS = [
    {},
    {"guidance_scale": 1.0},
    {"guidance_renorm": 0.3, "guidance_trunc": 400},
    {"image_guidance_scale": 1.5},
    {"flow_shift": 2.0},
]


@pytest.mark.parametrize("config", [SMALL, SMALL_ROTARY])
@pytest.mark.parametrize("options", CALLS)
def test_the_same_call_gives_the_same_video(config, options):
    prompts = small_prompts(config, 2)
    expected = StandInPipeline(config)(prompts, **FAST, **options).frames
    pipe = StandInPipeline(config)
    assert nova.accelerate(pipe) is pipe
    result = pipe(prompts, **FAST, **options).frames
    assert pipe.transformer.calls == 0
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


def test_given_latents_go_on():
    prompts = small_prompts(SMALL, 2)
    given = torch.randn(2, *SMALL.latent_shape, generator=torch.Generator().manual_seed(5))
    expected = StandInPipeline()(prompts, **FAST, latents=[given]).frames
    pipe = nova.accelerate(StandInPipeline())
    result = pipe(prompts, **FAST, latents=[given]).frames
    assert torch.equal(result[:, :, 0], given)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    only = pipe(prompts, **{**FAST, "max_latent_length": 1}, latents=[given]).frames
    assert torch.equal(only[:, :, 0], given)


def test_weights_are_shared_and_stay_as_they_were():
    pipe = StandInPipeline()
    parameters = dict(pipe.transformer.named_parameters())
    pipe.transformer.video_encoder.norm.requires_grad_(True)
    flags = {name: p.requires_grad for name, p in parameters.items()}
    nova.accelerate(pipe)
    now = dict(pipe.transformer.named_parameters())
    assert all(now[name] is parameters[name] for name in parameters)
    assert {name: p.requires_grad for name, p in now.items()} == flags
    before = pipe(small_prompts(SMALL, 1), **FAST).frames
    for parameter in parameters.values():
        parameter.data.mul_(1.1)
    assert not torch.equal(pipe(small_prompts(SMALL, 1), **FAST).frames, before)
    pipe.transformer.to(torch.float64)
    assert pipe(small_prompts(SMALL, 1), **FAST).frames.dtype == torch.float64
    assert nova.report(pipe).dtype == "float64"


def test_restore():
    pipe = nova.accelerate(StandInPipeline())
    assert nova.report(pipe).accelerated
    assert nova.restore(pipe) is pipe and nova.restore(pipe) is pipe
    assert not nova.report(pipe).accelerated
    assert str(nova.report(pipe)) == "sampling: the reference's, float32 on cpu"
    pipe(small_prompts(SMALL, 1), **FAST)
    assert pipe.transformer.calls == 1


def test_what_is_not_covered_is_left_to_the_reference():
    pipe = nova.accelerate(StandInPipeline())
    with pytest.warns(UserWarning, match="spatiotemporal_guidance_scale"):
        pipe(small_prompts(SMALL, 1), **FAST, spatiotemporal_guidance_scale=1.0)
    assert pipe.transformer.calls == 1
    assert "spatiotemporal" in str(nova.report(pipe))
    pipe(small_prompts(SMALL, 1), **FAST)
    assert pipe.transformer.calls == 1 and nova.report(pipe).left_to_reference is None


def test_other_pipelines_are_refused():
    with pytest.raises(nova.InputError, match="not a pipeline of the reference"):
        nova.accelerate(SimpleNamespace(transformer=None))
    with pytest.raises(nova.InputError, match="has no sample_scheduler, generate_video"):
        nova.accelerate(SimpleNamespace(transformer=small_model()))
    pipe = StandInPipeline()
    del pipe.transformer.motion_embed
    with pytest.raises(nova.CheckpointError, match="missing: motion_embed"):
        nova.accelerate(pipe)
    with pytest.raises(ValueError, match="backend must be one of"):
        nova.accelerate(StandInPipeline(), backend="fast")


def test_report_of_this_packages_own_pipeline(tiny_video_folder):
    pipe = nova.NOVAPipeline.from_pretrained(tiny_video_folder, backend="reference")
    assert str(nova.report(pipe)) == "sampling: nova, float32 on cpu, ops by backend='reference'"
