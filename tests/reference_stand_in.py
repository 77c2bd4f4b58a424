"""A stand-in for the reference package's pipeline: its parameters, its interface, its loops."""

from types import SimpleNamespace

import numpy as np
import torch
from small_models import SMALL, small_model
from torch import nn

from nova.conditioning import Conditioning
from nova.guidance import Guidance
from nova.model import NOVATransformer
from nova.noise import NoiseSource
from nova.plain_sampling import generate_frames_plain
from nova.schedule import scheduler_from_dict


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
        model, batch = self._model[0], len(inputs["x"])
        names = {"scale": "guidance_scale", "image_scale": "image_guidance_scale",
                 "renorm": "guidance_renorm", "trunc": "guidance_trunc"}  # fmt: skip
        guidance = Guidance(
            **{ours: inputs[theirs] for ours, theirs in names.items() if theirs in inputs}
        )
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
