"""Sampling runs of a named geometry with random weights and prompts, for measurements."""

from collections.abc import Callable

import torch
from torch import Tensor

from nova.conditioning import Conditioning
from nova.config import named_config
from nova.guidance import Guidance
from nova.model import NOVATransformer
from nova.noise import NoiseSource
from nova.sampling import generate_frames
from nova.schedule import FlowMatchConfig, set_sizes


class RandomModelRun:
    """A model on its device, and a run of it that can be repeated with the same noise.

    Args:
        geometry: a name of `nova.config.NAMED_CONFIGS` with text conditioning.
        num_frames, num_steps, num_diffusion_steps: T, A and D.
        num_sets: run only so many sets of the first frame; None: the whole video.
        backend: of the ops, see `nova_kernels.dispatch`.

    Attributes:
        sets_of_video: non-empty sets of a whole video.
        sets_run: sets that `sample` runs.
    """

    def __init__(
        self,
        geometry: str,
        *,
        batch: int,
        num_frames: int,
        num_steps: int,
        num_diffusion_steps: int,
        device: torch.device,
        dtype: torch.dtype,
        num_sets: int | None = None,
        backend: str = "auto",
    ):
        config = named_config(geometry)
        torch.manual_seed(0)
        with device:
            self._model = NOVATransformer(config).to(dtype).eval().requires_grad_(False)
        self._model.set_backend(backend)
        self._guidance = Guidance(scale=5.0)
        self._schedule = FlowMatchConfig().schedule(num_diffusion_steps)
        prompts = torch.randn(batch, config.text_token_len, config.text_token_dim)
        with torch.no_grad():
            self._conditioning = Conditioning.from_text(
                self._model, prompts.to(device, dtype), None, self._guidance
            )
        sizes = set_sizes(config.num_image_tokens, num_steps)
        self.sets_of_video = len(sizes) * num_frames
        if num_sets is not None:
            num_frames, sizes = 1, sizes[:num_sets]
        self._num_frames, self._set_sizes = num_frames, sizes
        self.sets_run = len(sizes) * num_frames

    def sample(self, sampler: Callable = generate_frames) -> Tensor:
        """Latents (batch, channels, frames, h, w); the noise comes from seed 0 on the device."""
        model = self._model
        generator = torch.Generator(model.device).manual_seed(0)
        batch = self._conditioning.batch_size
        frames = sampler(
            model,
            self._conditioning,
            num_frames=self._num_frames,
            set_sizes=self._set_sizes,
            schedule=self._schedule,
            guidance=self._guidance,
            noise=NoiseSource(generator, batch, dtype=model.dtype, device=model.device),
        )
        return torch.stack(list(frames), dim=2)
