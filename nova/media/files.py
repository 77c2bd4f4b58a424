"""Files of images and videos: names, formats, rates, and whether they can be written."""

import os
import secrets
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from ..errors import InputError, MediaError
from ..output_folder import make_output_folder

H264_SUFFIXES = (".mp4", ".m4v", ".mov")
VIDEO_SUFFIXES = (*H264_SUFFIXES, ".gif")
IMAGE_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
OUTPUT_SUFFIXES = (*VIDEO_SUFFIXES, *IMAGE_FORMATS)


def check_writable(path: str | os.PathLike, suffixes: Sequence[str] = OUTPUT_SUFFIXES) -> Path:
    """Check before long work that an output can be written; missing folders are created.

    Returns:
        The path as a `Path`, with ~ expanded.

    Raises:
        MediaError: unknown suffix, the path is a folder or too long, or its folder cannot be
            made or written into.
    """
    try:
        path = Path(path).expanduser()
        is_folder = path.is_dir()
    except (OSError, RuntimeError) as error:  # too long a name; ~ of a user that there is not
        raise MediaError(f"{path} is no path: {error}.") from error
    if is_folder:
        raise MediaError(f"{path} is a folder; name a file in it, such as {path / 'video.mp4'}.")
    if path.suffix.lower() not in suffixes:
        raise MediaError(
            f"cannot tell the format of {path}: the name must end in one of {', '.join(suffixes)}."
        )
    make_output_folder(path.parent)
    return path


def frame_rate(fps: float) -> Fraction:
    """Return fps as a Fraction that containers can store, or raise InputError."""
    try:
        rate = Fraction(float(fps)).limit_denominator(1001)
    except (TypeError, ValueError, OverflowError):
        rate = Fraction(0)
    if not 0 < rate <= 1000:
        raise InputError(f"fps is {fps}; it must be a number from 0.001 to 1000.")
    return rate


def part_path(path: Path) -> Path:
    """A hidden file beside `path`: renaming is atomic within one file system only."""
    return path.with_name(f".nova-{secrets.token_hex(6)}.part")
