"""Reading images and videos, whatever their format, orientation, colours and rate."""

import importlib
import math
import os
import stat
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ..errors import InputError, MediaError
from ..numeric import checked_count
from .files import frame_rate
from .libraries import accurate_conversion, require

UNSPECIFIED_COLORSPACE = 2  # FFmpeg's AVCOL_SPC_UNSPECIFIED, which PyAV gives as a number

# Time stamps of a GIF are whole hundredths of a second: a frame may come half of one too late.
HELD_ROUNDING = 0.006


def read_image(path: str | os.PathLike) -> np.ndarray:
    """Read an image file as (H, W, 3) uint8.

    The EXIF orientation is applied, transparency is laid over white, and an animated file gives
    its first frame.

    Raises:
        MediaError: the file is missing, no image, damaged, too large, or has floating point
            pixels.
    """
    path = _existing_file(path)
    image_module = require("PIL.Image")
    try:
        with image_module.open(path) as image:
            return image_to_array(image)
    except image_module.DecompressionBombError as error:
        raise MediaError(f"{path} is too large an image ({error}); make it smaller.") from error
    except InputError as error:
        raise MediaError(f"{path} cannot be used: {error}") from error
    except Exception as error:  # Pillow's decoders raise almost anything on damaged files.
        raise MediaError(
            f"{path} cannot be read as an image: it is damaged, or not an image ({error})."
        ) from error


def image_to_array(image: Any) -> np.ndarray:
    """A PIL image as (H, W, 3) uint8: what `read_image` gives of its file.

    The EXIF orientation is applied, transparency is laid over white, and 16 bits become 8.

    Raises:
        InputError: floating point pixels.
    """
    if image.mode == "F":  # Pillow's conversion takes 255 for white; most files mean 1
        raise InputError("the image has floating point pixels; save it with 8 or 16 bits a pixel.")
    image = require("PIL.ImageOps").exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits a pixel; Pillow's own conversion would clip it
        grey = (np.clip(np.asarray(image), 0, 65535) // 257).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=-1)
    if image.has_transparency_data:
        return _over_white(np.asarray(image.convert("RGBA")))
    return np.array(image.convert("RGB"))


def _over_white(rgba: np.ndarray) -> np.ndarray:
    alpha = rgba[..., 3:].astype(np.float32) / 255
    return np.rint(rgba[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)


def read_video(
    path: str | os.PathLike,
    *,
    fps: float | None = None,
    max_frames: int | None = None,
    start: float = 0.0,
    last: bool = False,
) -> tuple[np.ndarray, float]:
    """Read a video file (mp4, mov, webm, mkv, avi, gif...).

    Args:
        path: the file.
        fps: wanted frames a second; every instant takes the nearest frame of the file, and a
            frame that the file holds for long stays until the next one.
            None keeps the file's frames as they are: one that is held counts once.
        max_frames: at most so many frames; None for all.
        start: seconds to skip at the beginning.
        last: with max_frames, keep the last frames of the file and not the first.

    Returns:
        (frames, fps): uint8 (T, H, W, 3) with T >= 1, and the frame rate as a float. Turning
        and mirroring that the file asks for are applied.

    Raises:
        MediaError: the file is missing, no video, damaged, truncated, or ends before `start`.
        InputError: an argument is out of range.
    """
    if fps is not None:
        frame_rate(fps)
    if max_frames is not None:
        max_frames = checked_count("max_frames", max_frames, least=1)
    if not (math.isfinite(start) and start >= 0):
        raise InputError(f"start is {start}; it must be a number of seconds, 0 or more.")
    path = _existing_file(path)
    av = require("av")
    try:
        with av.open(str(path), **_tolerance(av)) as container:
            stream, native_fps = _video_stream(container, path)
            decoded = _decode(container, stream, native_fps, path)
            if fps is None:
                chosen = (frame for time, frame in decoded if time > start - 0.1 / native_fps)
            else:
                # A GIF leaves out every frame that equals the one before: its mean rate says
                # nothing about how long a frame should last.
                usual_fps = math.inf if container.format.name == "gif" else native_fps
                chosen = _nearest_frames(decoded, usual_fps, fps, start)
            frames = _collect(chosen, max_frames, last)
    except (av.FFmpegError, OSError) as error:
        if isinstance(error, MediaError):
            raise
        raise MediaError(
            f"{path} cannot be read as a video: it is damaged, truncated, or not a video "
            f"({error.strerror})."
        ) from error
    if not frames:
        raise MediaError(f"{path} has no frame at or after {start:g} s; choose a smaller start.")
    if len({frame.shape for frame in frames}) > 1:
        raise MediaError(f"{path} changes its frame size midway; re-encode it at one size.")
    return np.stack(frames), float(native_fps if fps is None else fps)


def _tolerance(av: ModuleType) -> dict[str, str]:
    """Before version 19 PyAV refused files whose tags are not UTF-8, unless told otherwise."""
    return {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}


def _video_stream(container: Any, path: Path) -> tuple[Any, float]:
    """Return the first video stream and its frame rate, or raise MediaError."""
    name = container.format.name
    if name == "image2" or name.endswith("_pipe"):
        raise MediaError(f"{path} is an image, not a video; read it as one (read_image, --image).")
    if not container.streams.video or name == "tty":  # FFmpeg draws text files as terminals
        raise MediaError(f"{path} contains no video stream.")
    stream = container.streams.video[0]
    rate = stream.average_rate or stream.guessed_rate
    if not rate:
        raise MediaError(f"{path} contains no video frames, or does not state its frame rate.")
    stream.thread_type = "AUTO"
    return stream, float(rate)


def _decode(
    container: Any, stream: Any, native_fps: float, path: Path
) -> Iterator[tuple[float, Any]]:
    """Yield (seconds since the first frame, VideoFrame); MediaError if the file ends too early."""
    first_time = None
    count = 0
    end = 0.0
    for packet in container.demux():
        if packet.is_corrupt:
            raise MediaError(f"{path} is damaged or truncated after {count} frames.")
        if packet.pts is not None and packet.time_base is not None:
            end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        if packet.stream.index != stream.index:
            continue
        for frame in packet.decode():
            time = count / native_fps if frame.time is None else frame.time
            if first_time is None:
                first_time = time
            yield time - first_time, frame
            count += 1
    if count == 0:
        raise MediaError(f"{path} contains no video frames.")
    # A demuxer may take a truncated file for a short one: only the header knows better.
    if container.duration is not None:
        stated = container.duration / 1e6
        if "matroska" not in container.format.name:  # there FFmpeg's duration counts from 0
            stated += (container.start_time or 0) / 1e6
        if end < stated - 0.25:
            raise MediaError(
                f"{path} is truncated: it should last {stated:.2f} s and ends after {end:.2f} s."
            )


def _nearest_frames(
    decoded: Iterable[tuple[float, Any]], usual_fps: float, fps: float, start: float
) -> Iterator[Any]:
    """Yield, for each instant start + k / fps within the video, the frame to show.

    It is the nearest one; but a frame held for longer than usual stays until the next one, and
    the last for all its duration. With usual_fps = inf every frame is held.
    """
    k = 0
    previous = None
    previous_time = 0.0
    usual = 1 / usual_fps
    rounding = 0.1 / usual_fps  # time stamps of some containers are rounded to a millisecond
    for time, frame in decoded:
        held = time - previous_time > 1.5 * usual
        switch = time - HELD_ROUNDING if held else (previous_time + time) / 2 + rounding
        while previous is not None and start + k / fps < switch:
            yield previous
            k += 1
        previous, previous_time = frame, time
    duration = float(previous.duration * (previous.time_base or 0))  # 0 where the file has none
    held = duration > 1.5 * usual
    end = previous_time + duration - HELD_ROUNDING if held else previous_time + usual - rounding
    while start + k / fps < end:
        yield previous
        k += 1


def _collect(chosen: Iterable[Any], max_frames: int | None, last: bool) -> list[np.ndarray]:
    """Convert the chosen frames to arrays, keeping the first or last max_frames."""
    if last:
        chosen = deque(chosen, maxlen=max_frames)
    frames = []
    matrix = None
    for frame in chosen:
        # Once a file: PyAV keeps a frame whose side data were read until a garbage collection.
        matrix = matrix or _display_matrix(frame)
        frames.append(np.ascontiguousarray(_oriented(_frame_to_array(frame), matrix)))
        if len(frames) == max_frames:
            break
    return frames


def _frame_to_array(frame: Any) -> np.ndarray:
    reformatter = importlib.import_module("av.video.reformatter")
    options = {"interpolation": accurate_conversion(reformatter)}
    # Files that do not name their matrix follow the custom: BT.709 in high definition, else 601.
    if frame.colorspace == UNSPECIFIED_COLORSPACE:
        standard = "ITU709" if frame.height >= 720 else "ITU601"
        options["src_colorspace"] = reformatter.Colorspace[standard]
    if any(component.is_alpha for component in frame.format.components):
        return _over_white(frame.to_ndarray(format="rgba", **options))
    return frame.to_ndarray(format="rgb24", **options)


def _display_matrix(frame: Any) -> tuple[float, float, float, float]:
    """(a, b, c, d): the file asks to show a pixel (x, y) at (a x + c y, b x + d y), but for shifts.

    Values may be fixed-point: only their signs and relative sizes count.
    """
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV does not know the type of some other side data of the frame
        angle = math.radians(frame.rotation)  # counter-clockwise; mirroring is lost
        return math.cos(angle), -math.sin(angle), math.sin(angle), math.cos(angle)
    if matrix is None:
        return 1, 0, 0, 1
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
    return a, b, c, d


def _oriented(pixels: np.ndarray, matrix: tuple[float, float, float, float]) -> np.ndarray:
    """Turn by quarters and mirror (H, W, 3) as the display matrix says: a view of the pixels."""
    a, b, c, d = matrix
    if abs(a) + abs(d) >= abs(b) + abs(c):
        x_sign, y_sign = a, d
    else:
        pixels = pixels.swapaxes(0, 1)
        x_sign, y_sign = c, b
    return pixels[:: -1 if y_sign < 0 else 1, :: -1 if x_sign < 0 else 1]


def _existing_file(path: str | os.PathLike) -> Path:
    try:
        path = Path(path).expanduser()
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise MediaError(f"{path} does not exist.") from None
    # Too long a name, no permission; one that no file can have; ~ of a user that there is not.
    except (OSError, ValueError, RuntimeError) as error:
        raise MediaError(f"{path} cannot be read: {error}") from None
    if not stat.S_ISREG(status.st_mode):
        raise MediaError(f"{path} is not a file.")
    if status.st_size == 0:
        raise MediaError(f"{path} is empty (0 bytes).")
    return path
