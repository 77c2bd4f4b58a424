"""The arguments of a pipeline call."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .errors import InputError
from .guidance import Guidance
from .model import DEFAULT_FPS, DEFAULT_MOTION_FLOW
from .noise import Generators
from .numeric import check_finite, check_whole
from .outputs import OUTPUT_TYPES

COUNTS = ("num_inference_steps", "num_diffusion_steps", "num_images_per_prompt", "vae_batch_size")
OPTIONAL_COUNTS = ("max_latent_length", "context_frames", "max_batch_size")


@dataclass(frozen=True)
class Request:
    """What to generate. A batch has B = prompts x num_images_per_prompt samples.

    Attributes:
        prompt: sentence(s), or class id(s) of a class-conditional model.
        num_inference_steps: autoregressive steps a frame (A).
        num_diffusion_steps: denoise steps a set (D).
        max_latent_length: latent frames in all (T), given ones included; T latent frames are
            1 + 4 (T - 1) pixel frames. Default: 1 for image models; 9 (33 pixel frames) or the
            time base, whichever is less, for video models.
        guidance_scale, min_guidance_scale, guidance_trunc, guidance_renorm, image_guidance_scale:
            see `Guidance`.
        flow_shift: timestep shift of flow matching, for this call only.
        motion_flow: motion score (mean optical flow) that the model is told; a list: one a sample.
        fps: frames a second that the model is told; a list: one a sample.
        negative_prompt: what the unconditional pass is told; default: the null prompt.
        image: frame to go on from: a path, PIL image or uint8 array (H, W, 3); a list: one a
            sample.
        video: clip to go on from: a path, uint8 array (frames, H, W, 3), or a list of PIL images.
        latents: scaled latents to go on from: (B or 1, channels, K, h, w), or a list of K frames
            (B or 1, channels, h, w).
        context_frames: sliding window for clips beyond the trained length; see
            `sampling.generate_frames`.
        num_images_per_prompt: samples of every prompt.
        max_batch_size: samples that are generated at a time, at most; a larger batch runs in parts,
            with the same noise. None: all at once. Where memory does not suffice for so many, calls
            go on with fewer (docs/sampling.md).
        generator: one for the batch, or a list of one a sample (a sample then does not depend on
            what else is in the batch).
        prompt_embeds, negative_prompt_embeds: embeddings (B, n, text_token_dim), or a list of
            (n_i, text_token_dim), in place of prompts.
        callback_on_step_end: called as callback(pipe, step, timestep, tensors) after every
            autoregressive step, counted over all frames. `timestep` is the share of the
            frame's steps still to come, tensors["latents"] (B, channels, h, w) the frame so far. A
            dictionary that it returns may hold other "latents" to go on with. A batch in parts
            calls it for every part, steps from 0 again, with the latents of the part.
        callback_on_step_end_tensor_inputs: what `tensors` holds: "latents", "samples" (n,), which
            of the call's samples these are, or nothing.
        disable_progress_bar: no progress bar.
        vae_batch_size: samples decoded at a time, at most.
        output_type: "pil", "np", "uint8", "pt" or "latent"; see `NOVAPipelineOutput`.

    Raises:
        InputError: a count below one, a callback that cannot be called, or an unknown output type.
    """

    prompt: str | Sequence[str] | int | Sequence[int] | None = None
    num_inference_steps: int = 64
    num_diffusion_steps: int = 25
    max_latent_length: int | None = None
    guidance_scale: float = 5.0
    min_guidance_scale: float | None = None
    guidance_trunc: float = 0.0
    guidance_renorm: float = 1.0
    image_guidance_scale: float = 0.0
    flow_shift: float | None = None
    motion_flow: float | Sequence[float] = DEFAULT_MOTION_FLOW
    fps: float | Sequence[float] = DEFAULT_FPS
    negative_prompt: str | Sequence[str] | int | Sequence[int] | None = None
    image: Any = None
    video: Any = None
    latents: Tensor | Sequence[Tensor] | None = None
    context_frames: int | None = None
    num_images_per_prompt: int = 1
    max_batch_size: int | None = None
    generator: Generators = None
    prompt_embeds: Tensor | Sequence[Tensor] | None = None
    negative_prompt_embeds: Tensor | Sequence[Tensor] | None = None
    callback_on_step_end: Callable | None = None
    callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",)
    disable_progress_bar: bool = False
    vae_batch_size: int = 1
    output_type: str = "pil"

    def __post_init__(self) -> None:
        limits = (name for name in OPTIONAL_COUNTS if getattr(self, name) is not None)
        check_whole(self, *COUNTS, *limits, least=1)
        if self.flow_shift is not None:
            check_finite(self, "flow_shift")
        if self.callback_on_step_end is not None and not callable(self.callback_on_step_end):
            raise InputError("callback_on_step_end must be a function")
        if self.output_type not in OUTPUT_TYPES:
            raise InputError(f"output_type must be one of {OUTPUT_TYPES}, got {self.output_type!r}")
        unknown = set(self.callback_on_step_end_tensor_inputs) - {"latents", "samples"}
        if unknown:
            raise InputError(f'callbacks get "latents" and "samples", not {sorted(unknown)}')
        given = [name for name in ("image", "video", "latents") if getattr(self, name) is not None]
        if len(given) > 1:
            raise InputError(f"give one of image, video and latents, not {' and '.join(given)}")

    @property
    def guidance(self) -> Guidance:
        """The settings of guidance.

        Raises:
            InputError: see `Guidance`.
        """
        return Guidance(
            scale=self.guidance_scale,
            min_scale=self.min_guidance_scale,
            trunc=self.guidance_trunc,
            renorm=self.guidance_renorm,
            image_scale=self.image_guidance_scale,
        )
