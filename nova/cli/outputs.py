"""The files that `nova generate` writes."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from ..media import (
    VIDEO_SUFFIXES,
    check_writable,
    contact_sheet,
    contact_sheet_path,
    write_image,
    write_video,
)
from ..media.libraries import require


def check_output(path: Path) -> Path:
    """Check before long work that an image or video can be written under this name.

    Raises:
        MediaError: unknown suffix, or the folder cannot be written to.
        DependencyError: the library that writes the format is not installed.
    """
    path = check_writable(path)
    require("PIL.Image")
    if path.suffix.lower() in VIDEO_SUFFIXES:
        require("av")
    return path


def check_latents_file(path: Path) -> Path:
    """The same for the file of `--save-latents`."""
    return check_writable(path, (".safetensors",))


def overview_path(output: Path, num_samples: int) -> Path | None:
    """Where one sheet of several videos goes; None where the samples themselves show as much."""
    if num_samples == 1 or output.suffix.lower() not in VIDEO_SUFFIXES:
        return None
    return contact_sheet_path(output)


def check_outputs(samples: Iterable[Path], *, sheets: bool, overview: Path | None) -> None:
    """Check before long work that files of several names can be written, and those beside them.

    Args:
        sheets: of videos contact sheets are written too.

    Raises:
        MediaError: a name that is too long, or is a folder's.
    """
    for path in samples:
        check_output(path)
        if sheets and path.suffix.lower() in VIDEO_SUFFIXES:
            check_output(contact_sheet_path(path))
    if overview is not None:
        check_output(overview)


def write_sample(
    path: Path, frames: np.ndarray, fps: float, *, caption: str | None, sheet: bool
) -> Iterator[str]:
    """Write a clip as the suffix says: a video, one image, or a contact sheet of several frames.

    Args:
        frames: uint8 (T, H, W, 3).
        caption: text on the contact sheet.
        sheet: write a contact sheet beside a video.

    Yields:
        One line for every file, as soon as it is there, which says what was written.
    """
    count, height, width = frames.shape[:3]
    size = f"{height} x {width} pixels"
    if path.suffix.lower() not in VIDEO_SUFFIXES:
        if count == 1:
            write_image(path, frames[0])
            yield f"{path}: {size}"
        else:
            write_image(path, contact_sheet(frames, caption=caption))
            yield f"{path}: contact sheet of {count} frames of {size}"
        return
    write_video(path, frames, fps)
    yield f"{path}: {count} frames of {size}, {count / fps:.2f} s at {fps:g} fps"
    if sheet:
        sheet_path = contact_sheet_path(path)
        write_image(sheet_path, contact_sheet(frames, caption=caption))
        yield f"{sheet_path}: contact sheet"
