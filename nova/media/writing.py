"""Writing images and whole clips, in the format that a file name asks for."""

import os
from pathlib import Path

import numpy as np

from ..errors import InputError, MediaError
from .contact_sheet import contact_sheet
from .files import IMAGE_FORMATS, VIDEO_SUFFIXES, check_writable, part_path
from .libraries import require
from .pixels import as_clip
from .video_writer import VideoWriter


def save(path: str | os.PathLike, frames: np.ndarray, fps: float | None = None) -> Path:
    """Write frames in the format that the suffix names.

    .mp4, .m4v, .mov: H.264. .gif: animation. .png, .jpg, .jpeg, .webp: one frame is written as
    it is, several frames as a contact sheet.

    Args:
        path: output file; missing folders are created.
        frames: uint8, (T, H, W, 3) or (H, W, 3).
        fps: frames a second; needed for videos.

    Returns:
        The path written.

    Raises:
        MediaError: unknown suffix, or the file cannot be written.
        InputError: frames or fps are unusable.
    """
    path = check_writable(path)
    if path.suffix.lower() in VIDEO_SUFFIXES:
        return write_video(path, frames, fps)
    clip = as_clip(frames)
    return write_image(path, clip[0] if len(clip) == 1 else contact_sheet(clip))


def write_image(path: str | os.PathLike, image: np.ndarray) -> Path:
    """Write one (H, W, 3) uint8 image as .png, .jpg, .jpeg or .webp; returns the path."""
    path = check_writable(path, tuple(IMAGE_FORMATS))
    clip = as_clip(image)
    if len(clip) != 1:
        raise InputError(f"write_image takes one image and was given {len(clip)}.")
    picture = require("PIL.Image").fromarray(clip[0])
    part = part_path(path)
    try:
        picture.save(part, format=IMAGE_FORMATS[path.suffix.lower()], quality=95)
        os.replace(part, path)
    except OSError as error:
        raise MediaError(f"{path} cannot be written: {error}.") from error
    finally:
        part.unlink(missing_ok=True)
    return path


def write_video(path: str | os.PathLike, frames: np.ndarray, fps: float) -> Path:
    """Write (T, H, W, 3) uint8 frames as H.264 (.mp4, .m4v, .mov) or .gif; returns the path.

    See `VideoWriter` for the format and the errors.
    """
    with VideoWriter(path, fps) as writer:
        writer.write(frames)
    return writer.path
