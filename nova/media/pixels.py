"""Pixel arrays: from what the VAE gives to uint8 frames of a wanted size."""

import math
from typing import TYPE_CHECKING

import numpy as np

from ..errors import InputError
from .libraries import require

if TYPE_CHECKING:
    from torch import Tensor


def to_uint8(pixels: "np.ndarray | Tensor") -> np.ndarray:
    """Convert model pixels in [-1, 1] to uint8: x * 127.5 + 127.5, clamped to 0..255, truncated.

    Args:
        pixels: floating point NumPy array or torch tensor on any device, (B, 3, T, H, W) or
            (B, 3, H, W). The arithmetic is in float32.

    Returns:
        NumPy uint8 array, (B, T, H, W, 3) or (B, H, W, 3).

    Raises:
        InputError: wrong shape, not floating point, or NaN or infinite values.
    """
    shape = tuple(pixels.shape)
    if len(shape) not in (4, 5) or shape[1] != 3:
        raise InputError(f"pixels have shape {shape}; expected (B, 3, T, H, W) or (B, 3, H, W).")
    is_tensor = hasattr(pixels, "detach")
    floating = pixels.is_floating_point() if is_tensor else pixels.dtype.kind == "f"
    if not floating:
        raise InputError(f"pixels are {pixels.dtype}; expected floating point in [-1, 1].")

    # One sample at a time: the float32 copy of a large batch would cost four times its result.
    convert = _tensor_to_uint8 if is_tensor else _array_to_uint8
    samples = [convert(sample) for sample in pixels]
    refuse_bad_values(sum(count for _, count in samples), math.prod(shape))
    if not samples:
        return np.zeros((0, *shape[2:], 3), np.uint8)
    return np.stack([sample for sample, _ in samples])


def check_clip(frames: np.ndarray) -> None:
    """Raise an InputError unless frames are uint8 (T, H, W, 3), none of the sizes 0."""
    shape, dtype = np.shape(frames), getattr(frames, "dtype", None)
    if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or 0 in shape:
        raise InputError(
            f"frames have shape {shape} and type {dtype}; expected uint8 (T, H, W, 3), T >= 1."
        )


def refuse_bad_values(bad: int, total: int) -> None:
    """Raise an InputError if any of `total` pixel values are NaN or infinite."""
    if bad:
        raise InputError(
            f"{bad} of {total} pixel values are NaN or infinite. Half precision may have "
            "overflowed: try bfloat16 or float32."
        )


def _tensor_to_uint8(sample: "Tensor") -> tuple[np.ndarray, int]:
    sample = sample.detach().float()
    bad = int((~sample.isfinite()).sum())
    sample = sample.mul(127.5).add_(127.5).clamp_(0, 255).byte()
    return sample.movedim(0, -1).cpu().numpy(), bad


def _array_to_uint8(sample: np.ndarray) -> tuple[np.ndarray, int]:
    sample = sample.astype(np.float32)
    finite = np.isfinite(sample)
    sample = np.where(finite, np.clip(sample * 127.5 + 127.5, 0, 255), 0).astype(np.uint8)
    return np.moveaxis(sample, 0, -1), int(finite.size - finite.sum())


def fit(frames: np.ndarray, height: int, width: int) -> tuple[np.ndarray, bool]:
    """Scale frames so that they cover height x width, and cut the centre out.

    Args:
        frames: uint8, (T, H, W, 3) or (H, W, 3).
        height, width: size of the result in pixels.

    Returns:
        (frames, changed): frames of exactly that size, and whether they differ from the input.

    Raises:
        InputError: frames are not such an array, or a size is below one.
    """
    clip = as_clip(frames)
    if height < 1 or width < 1:
        raise InputError(f"cannot fit frames to {height} x {width} pixels.")
    source_height, source_width = clip.shape[1:3]
    if (source_height, source_width) == (height, width):
        return np.asarray(frames), False

    image_module = require("PIL.Image")
    scale = max(height / source_height, width / source_width)
    box_height, box_width = height / scale, width / scale
    top, left = (source_height - box_height) / 2, (source_width - box_width) / 2
    # Rounding must not push the box beyond the image, which Pillow refuses.
    box = (
        max(left, 0.0),
        max(top, 0.0),
        min(left + box_width, source_width),
        min(top + box_height, source_height),
    )
    resized = np.empty((len(clip), height, width, 3), np.uint8)
    for index, frame in enumerate(clip):
        image = image_module.fromarray(frame)
        resized[index] = image.resize((width, height), image_module.Resampling.LANCZOS, box=box)
    return (resized if np.ndim(frames) == 4 else resized[0]), True


def as_clip(frames: np.ndarray) -> np.ndarray:
    """Return frames as a uint8 (T, H, W, 3) array; a single image becomes a clip of one."""
    try:
        array = np.asarray(frames)
    except ValueError as error:  # of frames of different sizes
        raise InputError(f"frames are no array: {error}.") from None
    if array.dtype != np.uint8:
        raise InputError(
            f"frames are {array.dtype}; expected uint8 (to_uint8 converts pixels in [-1, 1])."
        )
    clip = array[None] if array.ndim == 3 else array
    if clip.ndim != 4 or clip.shape[-1] != 3 or 0 in clip.shape[1:]:
        raise InputError(f"frames have shape {array.shape}; expected (T, H, W, 3) or (H, W, 3).")
    return clip
