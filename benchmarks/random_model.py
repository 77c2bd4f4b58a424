"""Sampling runs of a geometry with random weights and prompts, or a checkpoint's weights."""

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from work_counts import Work, sampling_work

from nova.conditioning import Conditioning
from nova.config import ModelConfig, named_config
from nova.errors import InputError
from nova.folders import load_parts
from nova.guidance import Guidance
from nova.layers import patchify
from nova.model import NOVATransformer
from nova.noise import NoiseSource
from nova.sampling import generate_frames
from nova.schedule import FlowMatchConfig, set_sizes
from nova.token_order import TokenOrder


class DrawsInFloat32(NoiseSource):
    """The numbers that are drawn in another dtype, in float32."""

    def uniform(self, *shape: int) -> Tensor:
        # Sorted to tell the order of the tokens. Half precision draws many of them equal, which
        # another dtype need not sort alike; ranks it does.
        return super().uniform(*shape).argsort(dim=1).argsort(dim=1).float()

    def normal(self, *shape: int) -> Tensor:
        return super().normal(*shape).float()


def check_takes_text(config: ModelConfig, name: str) -> None:
    """Check that a model is one to be measured.

    Raises:
        InputError: it takes no text.
    """
    if not config.text_token_dim:
        raise InputError(f"{name} takes class labels; choose a model that takes text")


class RandomModelRun:
    """A model on its device, and a run of it that can be repeated with the same noise.

    Args:
        geometry: a name of `nova.config.NAMED_CONFIGS` with text conditioning.
        num_frames, num_steps, num_diffusion_steps: T, A and D.
        num_sets: run only so many sets of the first frame; None: all.
        run_frames: run only so many latent frames, at most T; None: all.
        backend: of the ops, see `nova_kernels.dispatch`.
        checkpoint: a folder whose transformer and scheduler are taken in place of random weights;
            `geometry` does not matter then. Prompts are random all the same.

    Attributes:
        config: of the model.
        sets_of_video: non-empty sets of a whole video.
        sets_run: sets that `sample` runs.

    Raises:
        InputError: the model takes no text.
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
        run_frames: int | None = None,
        backend: str = "auto",
        checkpoint: Path | None = None,
    ):
        torch.manual_seed(0)
        if checkpoint is not None:
            model, scheduler, *_ = load_parts(checkpoint, dtype, vae=None, text_encoder=None)
            model.to(device)
        else:
            scheduler = FlowMatchConfig()
            with device:
                model = NOVATransformer(named_config(geometry)).to(dtype)
        self._model = model.eval().requires_grad_(False)
        self._model.set_backend(backend)
        self._dtype, self._noise_kind = dtype, NoiseSource
        self.config = config = model.config
        check_takes_text(config, geometry)
        self._guidance = Guidance(scale=5.0)
        self._schedule = scheduler.schedule(num_diffusion_steps)
        prompts = torch.randn(batch, config.text_token_len, config.text_token_dim)
        self._conditioning = self.condition(list(prompts.to(device, dtype)))
        sizes = set_sizes(config.num_image_tokens, num_steps)
        self.sets_of_video = len(sizes) * num_frames
        if num_sets is not None:
            run_frames, sizes = 1, sizes[:num_sets]
        self._set_sizes = sizes
        self.shorten(min(run_frames or num_frames, num_frames))

    @property
    def batch(self) -> int:
        return self._conditioning.batch_size

    @property
    def device(self) -> torch.device:
        return self._model.device

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    def shorten(self, num_frames: int) -> None:
        """Run only so many latent frames from now on."""
        self._num_frames = num_frames
        self.sets_run = len(self._set_sizes) * num_frames

    @torch.no_grad()
    def condition(self, embeddings: list[Tensor]) -> Conditioning:
        """What stands in front of the first frame, from prompts (n_i, text_token_dim)."""
        padded = self._model.text_embed.pad(embeddings)
        return Conditioning.from_text(self._model, padded, None, self._guidance)

    def sample(
        self, sampler: Callable = generate_frames, on_frame: Callable[[], None] = lambda: None
    ) -> Tensor:
        """Latents (batch, channels, frames, h, w); the noise comes from seed 0 on the device.

        Args:
            on_frame: called when a frame has come, which a GPU may still be working on.
        """
        model = self._model
        frames = []
        for frame in sampler(
            model,
            self._conditioning,
            num_frames=self._num_frames,
            set_sizes=self._set_sizes,
            schedule=self._schedule,
            guidance=self._guidance,
            noise=self._noise(),
        ):
            on_frame()
            frames.append(frame)
        return torch.stack(frames, dim=2)

    def first_tokens(self, latents: Tensor, num_sets: int) -> Tensor:
        """What the first sets of the first frame revealed, of the latents that `sample` returns.

        Returns:
            (batch, n, token_dim), in the order in which tokens are revealed.
        """
        # A run draws its order first of all.
        order = TokenOrder.draw(self._model, self._noise(), self._guidance.passes)
        tokens = patchify(latents[:, :, 0], self.config.patch_size)
        return order.select(tokens, 0, sum(self._set_sizes[:num_sets]))

    def by_plain_torch(self, num_sets: int, dtype: torch.dtype) -> "RandomModelRun":
        """The first sets of the first frame, with plain torch in place of every op.

        Weights (a copy), prompts and draws are those of this run, whatever the dtype.
        """
        run = copy.copy(self)
        run._model = copy.deepcopy(self._model).to(dtype)
        run._model.set_backend("reference")
        run._conditioning = Conditioning(self._conditioning.tokens.to(dtype), self.batch)
        run._set_sizes = self._set_sizes[:num_sets]
        if dtype == torch.float32:
            run._noise_kind = DrawsInFloat32
        run.shorten(1)
        return run

    def _noise(self) -> NoiseSource:
        generator = torch.Generator(self.device).manual_seed(0)
        return self._noise_kind(generator, self.batch, dtype=self.dtype, device=self.device)

    def work(self) -> dict[str, Work]:
        """What `sample` takes by stage, with the exact sampler; see `work_counts`."""
        return sampling_work(
            self.config,
            batch=self.batch,
            num_frames=self._num_frames,
            set_sizes=self._set_sizes,
            schedule=self._schedule,
            guidance=self._guidance,
            dtype=self._model.dtype,
        )
