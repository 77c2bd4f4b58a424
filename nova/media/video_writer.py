"""Writing videos: complete files appear under their names, failures leave nothing behind."""

import importlib
import math
import os
import warnings
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError, MediaError
from .files import VIDEO_SUFFIXES, check_writable, frame_rate, part_path
from .libraries import accurate_conversion, require
from .pixels import as_clip

# Browsers slow a GIF down to 10 fps when a frame lasts less than two hundredths of a second.
GIF_MAX_FPS = 50

# FFmpeg's numbers: AVCOL_SPC_BT709, AVCOL_PRI_BT709 and AVCOL_TRC_BT709 are all 1.
BT709 = 1
LIMITED_RANGE = 1  # AVCOL_RANGE_MPEG: luma 16..235


class MediaWarning(UserWarning):
    """What was written differs in size or frame rate from what was asked for."""


class VideoWriter:
    """Write a video piece by piece; a context manager.

        with VideoWriter("out.mp4", fps=12) as writer:
            for frames in stream:
                writer.write(frames)

    The file appears when the block ends. If it ends by an exception, nothing is left behind.
    Videos are H.264, yuv420p, BT.709, index in front (faststart): what browsers play. As this
    needs even sizes, an odd row or column is repeated once, with a `MediaWarning`. A GIF gets one
    palette for all frames; above 50 fps, which browsers refuse, frames are dropped with a
    `MediaWarning`.

    Args:
        path: output file, .mp4, .m4v, .mov or .gif; missing folders are created.
        fps: frames a second, above 0.
        crf: H.264 quality, 0 (lossless) to 51; 17 cannot be told from the original.

    Raises:
        MediaError: the path cannot be written, or no frame was written.
        InputError: fps, crf or frames are unusable.
    """

    def __init__(self, path: str | os.PathLike, fps: float, *, crf: int = 17):
        self.fps = frame_rate(fps)
        if not 0 <= crf <= 51:
            raise InputError(f"crf is {crf}; it must lie in 0..51.")
        self.path = check_writable(path, VIDEO_SUFFIXES)
        self.frame_count = 0
        self._frame_shape = None
        self._part = part_path(self.path)
        if self.path.suffix.lower() == ".gif":
            self._encoder = _GifEncoder(self._part, self.fps)
        else:
            self._encoder = _H264Encoder(self._part, self.path.suffix.lower(), self.fps, crf)

    def write(self, frames: np.ndarray) -> None:
        """Append uint8 frames, (T, H, W, 3) or (H, W, 3), all of one size."""
        if self._encoder is None:
            raise MediaError(f"the writer of {self.path} is closed.")
        for frame in as_clip(frames):
            if self._frame_shape is None:
                self._frame_shape = frame.shape
            if frame.shape != self._frame_shape:
                raise InputError(
                    f"frame {self.frame_count} has shape {frame.shape}, the ones before "
                    f"{self._frame_shape}; a video has one size."
                )
            self._guarded(self._encoder.add, frame)
            self.frame_count += 1

    def close(self) -> None:
        """Finish the file and give it its name; closing twice does nothing."""
        if self._encoder is None:
            return
        if self.frame_count == 0:
            self.abort()
            raise MediaError(f"{self.path} was not written: there were no frames.")
        self._guarded(self._encoder.finish)
        self._guarded(os.replace, self._part, self.path)
        self._encoder = None

    def abort(self) -> None:
        """Drop what was written so far."""
        if self._encoder is not None:
            encoder, self._encoder = self._encoder, None
            encoder.abort()
        self._part.unlink(missing_ok=True)

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *details: object) -> None:
        if exc_type is None:
            self.close()
        else:
            self.abort()

    def _guarded(self, step: Callable[..., object], *args: object) -> None:
        """Run one step; on failure drop the file, and report errors of the disk or the encoder."""
        try:
            step(*args)
        except OSError as error:
            self.abort()
            raise MediaError(f"{self.path} cannot be written: {error}.") from error
        except BaseException:
            self.abort()
            raise


class _H264Encoder:
    """H.264 through libx264; the container opens with the first frame, whose size it takes."""

    def __init__(self, part: Path, suffix: str, fps: Fraction, crf: int):
        self._av = require("av")
        self._reformatter = importlib.import_module("av.video.reformatter")
        self._part = part
        self._container_format = "mov" if suffix == ".mov" else "mp4"
        self._fps = fps
        self._crf = crf
        self._container = None
        self._stream = None
        self._index = 0

    def add(self, frame: np.ndarray) -> None:
        height, width = frame.shape[:2]
        if height % 2 or width % 2:
            if self._container is None:
                warnings.warn(
                    f"H.264 needs even sizes: {width} x {height} is written as "
                    f"{width + width % 2} x {height + height % 2} (last row or column repeated).",
                    MediaWarning,
                    stacklevel=4,
                )
            frame = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        if self._container is None:
            self._open(*frame.shape[:2])
        self._encode(self._yuv(frame))

    def finish(self) -> None:
        self._encode(None)
        container, self._container = self._container, None
        try:
            container.close()
        except self._av.FFmpegError as error:
            raise OSError(error.errno, error.strerror) from error

    def abort(self) -> None:
        if self._container is None:
            return
        try:
            self._container.close()
        except (OSError, self._av.FFmpegError):
            pass  # The file is about to be deleted; the error that led here is what matters.

    def _open(self, height: int, width: int) -> None:
        try:
            self._container = self._av.open(
                str(self._part),
                mode="w",
                format=self._container_format,
                options={"movflags": "+faststart"},
            )
            self._stream = self._container.add_stream("libx264", rate=self._fps)
        except (self._av.FFmpegError, ValueError) as error:
            raise OSError(f"the H.264 encoder does not start ({error})") from error
        self._stream.height, self._stream.width = height, width
        self._stream.pix_fmt = "yuv420p"
        self._stream.options = {
            "crf": str(self._crf),
            "preset": "medium",
            # The conversion below takes a colour sample at the centre of its four pixels; the
            # standard's default is the left edge, which would shift colours on reading.
            "x264-params": "chromaloc=1",
        }
        # Named colours: players guess differently where a file leaves them open.
        codec = self._stream.codec_context
        codec.colorspace = codec.color_primaries = codec.color_trc = BT709
        codec.color_range = LIMITED_RANGE

    def _yuv(self, frame: np.ndarray) -> Any:
        video_frame = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), "rgb24")
        video_frame = video_frame.reformat(
            format="yuv420p",
            dst_colorspace=self._reformatter.Colorspace.ITU709,
            dst_color_range=self._reformatter.ColorRange.MPEG,
            interpolation=accurate_conversion(self._reformatter),
        )
        video_frame.pts, video_frame.time_base = self._index, 1 / self._fps
        self._index += 1
        return video_frame

    def _encode(self, video_frame: Any) -> None:
        try:
            self._container.mux(self._stream.encode(video_frame))
        except self._av.FFmpegError as error:
            raise OSError(error.errno, error.strerror) from error


class _GifEncoder:
    """GIF through Pillow; frames are kept until the end, for one palette that fits them all."""

    def __init__(self, part: Path, fps: Fraction):
        self._image = require("PIL.Image")
        self._part = part
        self._fps = fps
        self._frames = []

    def add(self, frame: np.ndarray) -> None:
        self._frames.append(frame.copy())

    def finish(self) -> None:
        frames, fps = self._frames, self._fps
        if fps > GIF_MAX_FPS:
            warnings.warn(
                f"a GIF shows at most {GIF_MAX_FPS} frames a second: frames are dropped from "
                f"{float(fps):g} fps.",
                MediaWarning,
                stacklevel=4,
            )
            count = math.ceil(len(frames) * GIF_MAX_FPS / fps)
            frames = [frames[int(k * fps / GIF_MAX_FPS)] for k in range(count)]
            fps = GIF_MAX_FPS
        # Delays are whole hundredths of a second: round the instants, so that errors cancel out.
        instants = [round(100 * k / fps) for k in range(len(frames) + 1)]
        delays = [
            10 * (after - before) for before, after in zip(instants[:-1], instants[1:], strict=True)
        ]
        palette = self._palette(frames)
        images = [
            self._image.fromarray(frame).quantize(
                palette=palette, dither=self._image.Dither.FLOYDSTEINBERG
            )
            for frame in frames
        ]
        images[0].save(
            self._part,
            format="GIF",
            save_all=True,
            append_images=images[1:],
            duration=delays if len(delays) > 1 else delays[0],
            loop=0,
        )

    def abort(self) -> None:
        self._frames = []

    def _palette(self, frames: list[np.ndarray]) -> Any:
        """256 colours chosen on up to 16 frames: one palette for all keeps still areas still."""
        chosen = np.linspace(0, len(frames) - 1, min(len(frames), 16)).round().astype(int)
        # About 64,000 pixels of each are enough, and much quicker than all.
        step = max(1, round(math.sqrt(frames[0].size / 3 / 64_000)))
        pixels = np.concatenate([frames[index][::step, ::step] for index in chosen])
        return self._image.fromarray(pixels).quantize(
            256, method=self._image.Quantize.MEDIANCUT, kmeans=1
        )
