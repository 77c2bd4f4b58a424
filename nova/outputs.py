"""What a pipeline call returns, in the types that diffusers users expect."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .media.pixels import refuse_bad_values, to_uint8

OUTPUT_TYPES = ("pil", "np", "uint8", "pt", "latent")


@dataclass
class NOVAPipelineOutput:
    """Result of a call: `images` of image models, `frames` of video models; the other is None.

    With output_type:
        "pil": a list of PIL images, or for videos a list of such lists.
        "np": float32 arrays in [0, 1], (B, H, W, 3) or (B, T, H, W, 3).
        "uint8": the same as uint8.
        "pt": float tensors in [0, 1], (B, 3, H, W) or (B, T, 3, H, W).
        "latent": scaled latents (B, channels, h, w) or (B, channels, T, h, w).

    Attributes:
        latents: (B, channels, T, h, w) scaled latents, whatever the type.
        max_batch_size: samples that were generated at a time in the end. Where it is less than was
            asked for, memory was short: give it to the next call.
        peak_memory: bytes, the most that tensors and CUDA graphs took on the GPU during the call,
            attempts that failed included; None on other devices.
    """

    images: Any = None
    frames: Any = None
    latents: Tensor | None = None
    max_batch_size: int | None = None
    peak_memory: int | None = None

    def __getitem__(self, key: str | int) -> Any:
        """output["frames"] as with diffusers; output[0] is the images or the frames."""
        if isinstance(key, int):
            return [self.images if self.frames is None else self.frames][key]
        return getattr(self, key)


@dataclass
class StreamedFrames:
    """One item of `NOVAPipeline.stream`, after a latent frame is finished.

    Attributes:
        index: of the latent frame.
        latents: (n, channels, h, w) of this frame.
        frames: the pixel frames that are final now, in the type asked for, perhaps none of them:
            the VAE finishes frames a tile at a time (see docs/sampling.md).
        samples: which of the call's samples these are, n of them; all, but with `max_batch_size`.
    """

    index: int
    latents: Tensor
    frames: Any
    samples: range


def convert_pixels(pixels: Tensor, output_type: str) -> Any:
    """Pixels in [-1, 1], (B, 3, H, W) or (B, 3, T, H, W), to an output type other than "latent".

    Raises:
        InputError: pixels that are not finite (as after an overflow in half precision).
    """
    if output_type == "pt":
        refuse_bad_values(pixels.numel() - int(pixels.isfinite().sum()), pixels.numel())
        scaled = (pixels.float() / 2 + 0.5).clamp(0, 1)
        return scaled.transpose(1, 2) if pixels.dim() == 5 else scaled
    arrays = to_uint8(pixels)
    if output_type == "uint8":
        return arrays
    if output_type == "np":
        return arrays.astype(np.float32) / 255
    from PIL import Image

    if arrays.ndim == 4:
        return [Image.fromarray(image) for image in arrays]
    return [[Image.fromarray(frame) for frame in clip] for clip in arrays]


def join_samples(parts: list[Any]) -> Any:
    """Parts of a batch in one output type -> the batch."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(parts)
    if isinstance(first, np.ndarray):
        return np.concatenate(parts)
    return [sample for part in parts for sample in part]


def join_in_time(pieces: list[Any]) -> Any:
    """Pixel frames of the same clips in one output type, one piece after the other -> the clips."""
    first = pieces[0]
    if isinstance(first, Tensor):
        return torch.cat(pieces, dim=1)
    if isinstance(first, np.ndarray):
        return np.concatenate(pieces, axis=1)
    return [[frame for part in clip for frame in part] for clip in zip(*pieces, strict=True)]
