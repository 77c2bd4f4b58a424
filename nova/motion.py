"""Motion score of a clip: the mean length of its optical flow, by OpenCV.

The unit is pixels a frame in a clip of 256 pixels on the shorter side at 12 frames a second, so
that scores of clips of any size and rate can be compared. Training writes this number beside a
clip, and `motion_flow` asks a model for it.

The flow is that of dense inverse search (DIS). On plain surfaces, where nothing can be seen moving,
it goes on from what moves nearby: a small shape on a plain background counts for more than its
area.
"""

from types import ModuleType

import numpy as np

from .errors import InputError, dependency_error
from .media.pixels import check_clip
from .numeric import checked_count, is_finite_number

SHORTER_SIDE = 256  # pixels
FPS = 12


def motion_score(frames: np.ndarray, fps: float = FPS, max_pairs: int | None = None) -> float:
    """Mean optical flow of a clip, in pixels a frame at 256 pixels and 12 frames a second.

    Frames are scaled to a shorter side of 256 pixels, and of a clip with more than 12 frames a
    second the nearest ones at 12 are compared; the mean is over all pixels and pairs of frames.
    Same frames, same score.

    Args:
        frames: uint8 (T, H, W, 3), RGB, at least two frames.
        fps: frames a second, above 0.
        max_pairs: compare at most so many pairs of neighbouring frames, evenly spread over the
            clip; None: all of them.

    Raises:
        InputError: wrong shape or dtype, fewer than two frames, an unusable rate, or no pairs.
        DependencyError: OpenCV is not installed.
    """
    check_clip(frames)
    if len(frames) < 2:
        raise InputError("a motion score needs at least two frames, got one")
    if not (is_finite_number(fps) and fps > 0):
        raise InputError(f"fps must be a number above 0, got {fps!r}")
    if max_pairs is not None:
        max_pairs = checked_count("max_pairs", max_pairs, least=1)
    finder = _flow_finder()
    indices = _frames_at_rate(len(frames), fps)
    pairs = len(indices) - 1
    count = pairs if max_pairs is None else min(max_pairs, pairs)
    chosen = np.linspace(0, pairs - 1, count).round().astype(int)
    lengths = []
    for before, after in zip(indices[chosen], indices[chosen + 1], strict=True):
        flow = finder.calc(_gray(frames[before]), _gray(frames[after]), None)
        lengths.append(np.linalg.norm(flow, axis=-1).mean() / (after - before))
    return float(np.mean(lengths) * fps / FPS)


def require_opencv() -> ModuleType:
    """Import OpenCV, or say how to install it."""
    try:
        import cv2
    except ImportError as error:
        raise dependency_error(
            "optical flow, and measuring clips, need OpenCV",
            "cv2",
            "pip install 'nova-kernels[motion]'",
            error,
        ) from error
    return cv2


def _flow_finder():
    """The medium preset with less of what costs most: as exact on clips of known motion, in half
    the time."""
    cv2 = require_opencv()
    finder = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    finder.setPatchStride(4)
    finder.setGradientDescentIterations(12)
    finder.setVariationalRefinementIterations(1)
    return finder


def _frames_at_rate(count: int, fps: float) -> np.ndarray:
    """Numbers of the frames nearest to 12 a second: all of a slower clip, at least two."""
    step = min(max(fps / FPS, 1), count - 1)
    numbers = np.arange(0, count - 0.5, step).round().astype(int)
    return np.unique(numbers.clip(max=count - 1))  # In floats the last may be at count - 0.5.


def _gray(frame: np.ndarray) -> np.ndarray:
    """(H, W) gray levels, with the shorter side of `SHORTER_SIDE` pixels."""
    cv2 = require_opencv()
    gray = cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2GRAY)
    height, width = gray.shape
    scale = SHORTER_SIDE / min(height, width)
    if scale == 1:
        return gray
    size = (round(width * scale), round(height * scale))
    return cv2.resize(gray, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
