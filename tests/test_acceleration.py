"""nova.accelerate, on a stand-in with the parameters and the interface of the reference."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_models import SMALL, SMALL_ROTARY, small_model, small_prompts
from torch import nn

import nova
from nova.conditioning import Conditioning
from nova.guidance import Guidance
from nova.model import NOVATransformer
from nova.noise import NoiseSource
from nova.plain_sampling import generate_frames_plain
from nova.schedule import scheduler_from_dict

FAST = {"num_inference_steps": 4, "num_diffusion_steps": 3, "max_latent_length": 2}


class FlowMatchEulerDiscreteScheduler:
    """Its name, config and shift are what the reference's has."""

    def __init__(self):
        self.config = {"num_train_timesteps": 1000, "shift": 1.0, "use_dynamic_shifting": False}
        self.shift = 1.0

    def set_shift(self, shift):
        self.shift = shift


class StandInTransformer(nn.Module):
    """The submodules of a model, by the names that the reference gives them, and its loops."""

    def __init__(self, model: NOVATransformer, scheduler):
        super().__init__()
        for name, module in model.named_children():
            setattr(self, name, module)
        self._model = [model]  # no submodule
        self.config = {**model.config.to_dict(), "_name_or_path": "somewhere"}
        self.sample_scheduler = scheduler
        self.calls = 0

    @property
    def dtype(self):
        return self.mask_embed.mask_token.dtype

    @property
    def device(self):
        return self.mask_embed.mask_token.device

    def forward(self, inputs):
        model, (flow, fps) = self._model[0], ([5.0] * inputs["batch_size"], [12.0])
        inputs["x"] = torch.empty(inputs["batch_size"], *model.config.latent_shape).to(self.dtype)
        prompt = inputs.pop("prompt")
        motion = model.motion_embed(torch.tensor(flow), torch.tensor(fps).expand(len(flow)))
        motion = motion.repeat(len(prompt) // len(flow), 1, 1)
        inputs["c"] = torch.cat([model.text_embed(prompt), motion], dim=1)
        self.generate_video(inputs)
        return {"x": torch.stack(inputs["latents"], dim=2)}

    def generate_video(self, inputs):
        self.calls += 1
        model, batch = self._model[0], inputs["batch_size"]
        names = {"scale": "guidance_scale", "image_scale": "image_guidance_scale",
                 "renorm": "guidance_renorm", "trunc": "guidance_trunc"}  # fmt: skip
        guidance = Guidance(**{ours: inputs[theirs] for ours, theirs in names.items()})
        tokens = inputs["c"]
        if guidance.passes == 3:
            tokens = torch.cat([tokens, tokens[batch:]])
        scheduler = self.sample_scheduler
        config = {**scheduler.config, "_class_name": type(scheduler).__name__}
        given = inputs["latents"]
        frames = generate_frames_plain(
            model,
            Conditioning(tokens, batch),
            num_frames=inputs["max_latent_length"],
            set_sizes=[int(n) for n in inputs["num_preds"] if n > 0],
            schedule=scheduler_from_dict(config).schedule(
                inputs["num_diffusion_steps"], scheduler.shift
            ),
            guidance=guidance,
            noise=NoiseSource(inputs["generator"], batch, dtype=self.dtype, device=self.device),
            given_latents=given[-1][:, :, None] if given else None,
        )
        given.extend(frames)


class StandInPipeline:
    """What the reference's call does around its transformer, without text encoder and VAE."""

    def __init__(self, config=SMALL):
        self.scheduler = FlowMatchEulerDiscreteScheduler()
        self.transformer = StandInTransformer(small_model(config), self.scheduler)

    @torch.no_grad()
    def __call__(self, prompt_embeds, num_inference_steps, num_diffusion_steps, max_latent_length,
                 guidance_scale=3.0, flow_shift=None, latents=None, **options):  # fmt: skip
        if flow_shift:
            self.scheduler.set_shift(flow_shift)
        tokens = SMALL.num_image_tokens
        ratios = np.cos(0.5 * np.pi * np.arange(num_inference_steps + 1) / num_inference_steps)
        masked = np.round(ratios * tokens).astype("int64")
        batch = len(prompt_embeds)
        null = torch.zeros_like(prompt_embeds)
        prompts = torch.cat([prompt_embeds, null]) if guidance_scale > 1 else prompt_embeds
        inputs = {
            "guidance_renorm": 1, "guidance_trunc": 0, "image_guidance_scale": 0,
            **options,
            "guidance_scale": guidance_scale,
            "num_diffusion_steps": num_diffusion_steps,
            "max_latent_length": max_latent_length,
            "num_preds": masked[:-1] - masked[1:],
            "batch_size": batch,
            "prompt": prompts.to(self.transformer.dtype),
            "latents": [] if latents is None else latents,
            "generator": torch.Generator().manual_seed(3),
            "tqdm1": False, "tqdm2": False,
        }  # fmt: skip
        return SimpleNamespace(frames=self.transformer(inputs)["x"])


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
