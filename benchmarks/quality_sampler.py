"""From test cases to generated clips: the one part of the benchmark that runs a model."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

import numpy as np
import torch
from clip_lengths import latent_frames, pixel_frames
from quality_cases import Case

import nova
from nova import shapes
from nova.codec import to_pixels
from nova.errors import InputError
from nova.outputs import convert_pixels
from nova.pipeline import DEFAULT_LATENT_FRAMES
from nova.request import Request


@dataclass(frozen=True)
class SamplerSettings:
    """How clips are sampled; names and meaning are those of `nova.Request`.

    Raises:
        InputError: a value out of range.
    """

    num_inference_steps: int
    num_diffusion_steps: int
    guidance_scale: float
    min_guidance_scale: float | None = None
    guidance_trunc: float = 0.0
    guidance_renorm: float = 1.0
    image_guidance_scale: float = 0.0
    flow_shift: float | None = None

    def __post_init__(self) -> None:
        # Reading `guidance` checks it.
        _ = Request(**asdict(self)).guidance

    @classmethod
    def of(cls, request: Request) -> "SamplerSettings":
        """Those of a request."""
        return cls(**{field.name: getattr(request, field.name) for field in fields(cls)})


class ClipSampler:
    """Generates the clips of cases, and takes real clips through the VAE.

    Args:
        pipeline: of a text-to-video model, with text encoder and video VAE.
        batch_size: clips at a time; it changes nothing but the time.

    Attributes:
        num_frames: pixel frames of a clip of the trained length.
        size: height and width in pixels.

    Raises:
        InputError: the pipeline is not of that kind.
    """

    def __init__(self, pipeline: nova.NOVAPipeline, batch_size: int):
        _check_pipeline(pipeline)
        self._pipeline = pipeline
        self.batch_size = batch_size
        self.num_frames = pixel_frames(min(DEFAULT_LATENT_FRAMES, pipeline.config.time_base))
        self.size = pipeline.config.image_size

    @property
    def device(self) -> torch.device:
        return self._pipeline.device

    def sample(
        self,
        cases: Sequence[Case],
        settings: SamplerSettings,
        *,
        num_frames: int,
        given_frames: int = 0,
        context_frames: int | None = None,
    ) -> np.ndarray:
        """Generate one batch.

        Args:
            num_frames: pixel frames of the clips, given ones included.
            given_frames: so many frames of the real clips are given: 1 as an image, 1 + 4n as a
                clip to go on from.
            context_frames: latent frames that the model sees at a time; None: all.

        Returns:
            uint8 (B, num_frames, H, W, 3).
        """
        generators = [torch.Generator().manual_seed(case.seed) for case in cases]
        given = {}
        if given_frames == 1:
            given["image"] = [case.frames[0] for case in cases]
        elif given_frames:
            # What `video=` does for a single clip, with one clip a sample.
            pixels = to_pixels([case.frames[:given_frames] for case in cases])
            given["latents"] = self._pipeline.vae.encode(pixels, generators)
        return self._pipeline(
            [case.caption for case in cases],
            **asdict(settings),
            **given,
            max_latent_length=latent_frames(num_frames),
            motion_flow=[case.motion for case in cases],
            fps=shapes.FPS,
            context_frames=context_frames,
            generator=generators,
            disable_progress_bar=True,
            vae_batch_size=len(cases),
            output_type="uint8",
        ).frames

    def reconstruct(self, clips: Sequence[np.ndarray]) -> np.ndarray:
        """Clips of equal shape, uint8 (T, H, W, 3), encoded (posterior mean) and decoded.

        Returns:
            uint8 (B, T, H, W, 3).
        """
        vae, batch = self._pipeline.vae, len(clips)
        latents = vae.encode(to_pixels(clips), sample=False, batch_size=batch)
        return convert_pixels(vae.decode(latents, batch_size=batch), "uint8")


def _check_pipeline(pipeline: nova.NOVAPipeline) -> None:
    problem = None
    if not pipeline.config.text_token_dim:
        problem = "takes class ids, not sentences"
    elif not pipeline.config.is_video:
        problem = "makes images, not videos"
    elif pipeline.text_encoder is None:
        problem = "has no text encoder (the folders text_encoder/ and tokenizer/)"
    elif pipeline.vae is None:
        problem = "has no VAE (the folder vae/)"
    elif not pipeline.vae.is_video:
        problem = "has a VAE of images, not of videos"
    if problem:
        raise InputError(
            f"this model {problem}; the benchmark needs a checkpoint that makes videos from text, "
            "with text encoder and VAE"
        )
