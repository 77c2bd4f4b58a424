"""Opening a model for `nova generate`: first its configs, to see whether they fit; then weights."""

from dataclasses import dataclass
from pathlib import Path

import torch

from .. import inputs
from ..checkpoint import find_folder
from ..codec import read_temporal_factor
from ..config import ModelConfig
from ..devices import check_device, out_of_memory
from ..errors import InputError
from ..folders import LOAD, read_configs
from ..generation_config import GenerationConfig
from ..media import VIDEO_SUFFIXES
from ..pipeline import DEFAULT_LATENT_FRAMES, NOVAPipeline
from ..request import Request
from ..schedule import SchedulerConfig
from .samples import Condition


@dataclass(frozen=True)
class ModelFiles:
    """A checkpoint folder and its configurations, without weights."""

    folder: Path
    config: ModelConfig
    scheduler: SchedulerConfig
    generation_config: GenerationConfig

    @classmethod
    def find(cls, name_or_path: str, *, allow_pickle: bool) -> "ModelFiles":
        """Open a folder, or download a hub id.

        Raises:
            CheckpointError, ConfigError: what is wrong with which file.
        """
        folder = find_folder(name_or_path, allow_pickle=allow_pickle)
        config, scheduler = read_configs(folder)
        return cls(folder, config, scheduler, GenerationConfig.read(folder))

    def check_request(
        self,
        request: Request,
        conditions: list[Condition],
        negative: str | None,
        out: Path,
    ) -> None:
        """Find out before the weights are loaded whether this model can do what is asked.

        Raises:
            InputError: what does not fit, in terms of the command's options.
        """
        self._check_conditions(conditions, negative)
        self._check_frames(request)
        if not self.config.is_video and out.suffix.lower() in VIDEO_SUFFIXES:
            raise InputError(
                f"{self.folder} is an image model; name an image file such as "
                f"{out.with_suffix('.png')}"
            )
        if request.guidance.passes > 2 and self.config.text_token_dim is None:
            raise InputError("--image-guidance is for models that take prompts; leave it out")
        self.scheduler.schedule(request.num_diffusion_steps, request.flow_shift)

    def _check_conditions(self, conditions: list[Condition], negative: str | None) -> None:
        first = conditions[0]
        if self.config.text_token_dim is None:
            if not isinstance(first, int):
                raise InputError(
                    f"{self.folder} is a class-conditional model: give --class-id in place of a "
                    "prompt"
                )
            if negative is not None:
                raise InputError("--negative is for models that take prompts; leave it out")
            inputs.class_labels(conditions, None, 1)
        elif isinstance(first, int):
            raise InputError(f"{self.folder} takes prompts, not classes: give a sentence")
        elif isinstance(first, str):
            inputs.check_prompts(conditions)
        elif first.shape[-1] != self.config.text_token_dim:
            raise InputError(
                f"`prompt_embeds` has {first.shape[-1]} values a token; this model takes "
                f"{self.config.text_token_dim}"
            )

    def _check_frames(self, request: Request) -> None:
        wanted = request.max_latent_length
        if not self.config.is_video:
            if (wanted or 1) > 1:
                raise InputError(f"{self.folder} is an image model; leave --latents out")
            if request.image is not None or request.video is not None:
                raise InputError(
                    f"{self.folder} is an image model; --image and --video need a video model"
                )
        wanted = wanted or min(DEFAULT_LATENT_FRAMES, self.config.time_base)
        given = 0 if request.image is None else 1
        if request.video is not None:
            given = 1 + (len(request.video) - 1) // read_temporal_factor(self.folder / "vae")
        if given >= wanted:
            raise InputError(
                f"what is given is {given} of {wanted} latent frames already; to make more, "
                f"raise --latents to at least {given + 1}"
            )


def open_pipeline(
    folder: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    text_encoder: bool,
    text_encoder_device: str | None,
    offload: bool,
    vae_tiling: bool,
    backend: str,
    allow_pickle: bool,
    quiet: bool,
) -> NOVAPipeline:
    """A pipeline on its device.

    Args:
        text_encoder: False leaves it out.
        text_encoder_device: where it goes; None: to `device`.
        quiet: no progress bars while loading.

    Raises:
        CheckpointError, ConfigError, DependencyError, DeviceError: see `NOVAPipeline`.
    """
    if quiet:
        hide_loading_bars()
    pipeline = NOVAPipeline.from_pretrained(
        folder,
        torch_dtype=dtype,
        text_encoder=LOAD if text_encoder else None,
        allow_pickle=allow_pickle,
        backend=backend,
    )
    if offload:
        pipeline.enable_model_cpu_offload(device)
    else:
        pipeline.to(device, text_encoder=text_encoder_device is None)
        if pipeline.text_encoder is not None and text_encoder_device is not None:
            with out_of_memory("moving the text encoder"):
                pipeline.text_encoder.module.to(check_device(text_encoder_device))
    if vae_tiling and pipeline.vae is not None:
        pipeline.vae.module.enable_tiling()
    return pipeline


def hide_loading_bars() -> None:
    """Keep transformers from showing progress while it loads weights, for the whole process."""
    try:
        from transformers.utils import logging
    except ImportError:  # then nothing is loaded with it either
        return
    logging.disable_progress_bar()
