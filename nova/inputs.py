"""Checks what a pipeline call is given, and brings it into the shapes that the sampler takes."""

import os
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nova_kernels.autocast import autocast_dtype
from nova_kernels.openmp import gives_all_threads

from .codec import to_pixels
from .config import ModelConfig
from .errors import InputError
from .media import read_image, read_video
from .media.pixels import fit
from .media.reading import image_to_array
from .model import NULL_CLASS, TextEmbed
from .numeric import whole_number
from .text import PromptTruncationWarning


class InputWarning(UserWarning):
    """An input was changed to fit (resized, cropped), or a setting of torch has no effect."""


def note_dtype(device: torch.device, dtype: torch.dtype) -> None:
    """Warn where the dtype of the weights is not what torch.autocast asks for, or goes wrong."""
    wanted = autocast_dtype(device)
    if wanted is not None and wanted != dtype:
        warnings.warn(
            f"torch.autocast to {wanted} is ignored: sampling computes in {dtype}, the dtype of "
            f"the weights. Convert them: pipe.to({wanted})",
            InputWarning,
            stacklevel=4,
        )
    if device.type == "cpu" and dtype.itemsize < 4 and not gives_all_threads():
        warnings.warn(
            "OMP_DYNAMIC or OMP_THREAD_LIMIT gives torch fewer threads than it asks for, and its "
            f"products in {dtype} may go wrong then. Unset it, or use torch.float32",
            InputWarning,
            stacklevel=4,
        )


def check_prompts(prompt: Any, name: str = "prompt") -> list[str]:
    """A prompt or a list of them, none empty."""
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, list | tuple) or not all(isinstance(p, str) for p in prompts):
        raise InputError(f"{name} must be a sentence or a list of them, got {prompt!r}")
    if not prompts or any(not p.strip() for p in prompts):
        raise InputError(
            f"{name} is empty; write a sentence. (For samples without text, give "
            "prompt_embeds=[torch.zeros(0, text_token_dim)].)"
        )
    return list(prompts)


def check_negative_prompts(negative_prompt: Any, count: int) -> list[str] | None:
    """None, or one negative prompt for each of `count` prompts; empty ones are the null prompt."""
    if negative_prompt is None:
        return None
    if isinstance(negative_prompt, str):
        return [negative_prompt] * count
    if not isinstance(negative_prompt, list | tuple) or len(negative_prompt) != count:
        raise InputError(
            f"negative_prompt must be one sentence, or one for each of {count} prompts"
        )
    return list(negative_prompt)


def check_embeddings(embeds: Any, config: ModelConfig, name: str) -> list[Tensor]:
    """Prompt embeddings, (B, n, text_token_dim) or a list of (n_i, text_token_dim), as a list.

    More rows than text_token_len are cut, with a `PromptTruncationWarning`.
    """
    width, length = config.text_token_dim, config.text_token_len
    rows = list(embeds) if isinstance(embeds, Tensor | list | tuple) else []
    try:
        rows = [row if isinstance(row, Tensor) else _of_numbers(row) for row in rows]
    except (TypeError, ValueError, RuntimeError):  # of what holds no numbers
        rows = []
    if not rows or any(row.dim() != 2 or row.shape[1] != width for row in rows):
        raise InputError(
            f"{name} must be a tensor (batch, tokens, {width}) or a list of (tokens, {width}) "
            "tensors, one a prompt"
        )
    if any(not torch.isfinite(row).all() for row in rows):
        raise InputError(f"{name} holds NaN or infinite values")
    longest = max(len(row) for row in rows)
    if longest > length:
        warnings.warn(
            f"{name} has {longest} tokens; the model takes {length}, the rest is cut",
            PromptTruncationWarning,
            stacklevel=3,
        )
    return [row[:length] for row in rows]


def _of_numbers(values: Any) -> Tensor:
    """By NumPy, which keeps all digits of lists: torch would round them to its default dtype."""
    return torch.from_numpy(np.asarray(values))


def padded_prompts(embeds: list[Tensor], text_embed: TextEmbed, per_prompt: int) -> Tensor:
    """(B * per_prompt, text_token_len, text_token_dim): padded, each prompt repeated in place."""
    return text_embed.pad(embeds).repeat_interleave(per_prompt, dim=0)


def class_labels(prompt: Any, negative_prompt: Any, per_prompt: int) -> tuple[Tensor, Tensor]:
    """Labels and negative labels (B * per_prompt,) from class ids in 0..1000 (1000: no class)."""

    def as_list(value: Any, name: str) -> list[int]:
        values = value.tolist() if isinstance(value, Tensor | np.ndarray) else value
        values = values if isinstance(values, list | tuple) else [values]
        numbers = [whole_number(one) for one in values]
        if not numbers or any(n is None or not 0 <= n <= NULL_CLASS for n in numbers):
            raise InputError(
                f"{name} of a class-conditional model must be class ids in 0..{NULL_CLASS}, "
                f"got {value!r}"
            )
        return numbers

    labels = as_list(prompt, "prompt")
    negative = as_list(
        NULL_CLASS if negative_prompt is None else negative_prompt, "negative_prompt"
    )
    negative = negative * len(labels) if len(negative) == 1 else negative
    if len(negative) != len(labels):
        raise InputError(f"negative_prompt needs one class id, or {len(labels)}")
    both = (_of_numbers(ids).repeat_interleave(per_prompt) for ids in (labels, negative))
    return tuple(both)


def image_pixels(image: Any, size: tuple[int, int]) -> Tensor:
    """One image, or a list of them, as (count, 3, H, W) in [-1, 1], resized and cropped to `size`.

    Args:
        image: a path, a PIL image, or a uint8 array (H, W, 3); or a list of these.
    """
    images = image if isinstance(image, list | tuple) else [image]
    if not images:
        raise InputError("image is an empty list; give one image, or one a sample")
    arrays = [_array(one, read_image, 3, "image") for one in images]
    return to_pixels([_fitted(a, size, "image")[None] for a in arrays])[:, :, 0]


def video_pixels(video: Any, size: tuple[int, int], fps: float, stride: int) -> Tensor:
    """A clip as (1, 3, T, H, W) in [-1, 1] with T = 1 + stride * n: the last such frames.

    Args:
        video: a path (read at `fps`), a uint8 array (T, H, W, 3), or a list of PIL images.
        stride: pixel frames of a latent frame, but for the first.
    """
    if isinstance(video, list | tuple):
        if not video:
            raise InputError("video is an empty list; give its frames")
        frames = [_array(frame, read_image, 3, "video frame") for frame in video]
        sizes = sorted({frame.shape[:2] for frame in frames})
        if len(sizes) > 1:
            raise InputError(f"frames of a video must be of one size, got {sizes}")
        video = np.stack(frames)
    frames = _array(video, lambda path: read_video(path, fps=fps)[0], 4, "video")
    count = 1 + stride * ((len(frames) - 1) // stride)
    if count != len(frames):
        warnings.warn(
            f"the last {count} of the clip's {len(frames)} frames are used (1 + a multiple of "
            f"{stride} is needed)",
            InputWarning,
            stacklevel=2,
        )
    return to_pixels([_fitted(frames[-count:], size, "video")])


def _array(value: Any, read, dims: int, name: str) -> np.ndarray:
    if isinstance(value, str | os.PathLike):
        return read(value)
    if hasattr(value, "convert"):  # a PIL image
        value = image_to_array(value)
    try:
        array = np.asarray(value)
    except ValueError as error:  # of rows or frames of different sizes
        raise InputError(f"{name} is no array: {error}") from None
    if array.dtype != np.uint8 or array.ndim != dims or array.shape[-1] != 3 or not array.size:
        shape = "(height, width, 3)" if dims == 3 else "(frames, height, width, 3)"
        raise InputError(
            f"{name} must be a path, PIL images, or a uint8 array {shape}; got "
            f"{array.dtype} {array.shape}"
        )
    return array


def _fitted(frames: np.ndarray, size: tuple[int, int], name: str) -> np.ndarray:
    fitted, changed = fit(frames, *size)
    if changed:
        height, width = frames.shape[-3:-1]
        warnings.warn(
            f"the {name} of {height} x {width} pixels is resized and cropped to the model's "
            f"{size[0]} x {size[1]}",
            InputWarning,
            stacklevel=3,
        )
    return fitted


def given_latents(latents: Tensor | Sequence[Tensor], batch: int) -> Tensor:
    """Scaled latents to go on from, as (batch, channels, K, h, w).

    Args:
        latents: (B, channels, K, h, w), or a list of K frames (B, channels, h, w); B is `batch`,
            or 1 for the same in every sample.
    """
    if isinstance(latents, list | tuple):
        if not latents or any(not isinstance(x, Tensor) or x.dim() != 4 for x in latents):
            raise InputError("a list of latents must hold frames (batch, channels, h, w)")
        frames = [repeat_to_batch(frame, batch, "latents") for frame in latents]
        shapes = sorted({tuple(frame.shape) for frame in frames})
        if len(shapes) > 1:
            raise InputError(f"frames in a list of latents must be of one shape, got {shapes}")
        latents = torch.stack(frames, dim=2)
    if not isinstance(latents, Tensor) or latents.dim() != 5:
        raise InputError(
            "latents must be a tensor (batch, channels, frames, h, w) or a list of frames "
            f"(batch, channels, h, w), got {getattr(latents, 'shape', type(latents).__name__)}"
        )
    return repeat_to_batch(latents, batch, "latents")


def repeat_to_batch(x: Tensor, batch: int, name: str) -> Tensor:
    """x with 1 or `batch` samples -> `batch` samples."""
    if len(x) not in (1, batch):
        raise InputError(f"{name}: {len(x)} given for a batch of {batch} (prompts x images each)")
    return x.expand(batch, *x.shape[1:])
