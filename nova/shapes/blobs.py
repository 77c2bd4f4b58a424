"""One frame -> the regions that differ from the plain background, with soft outlines."""

from dataclasses import dataclass

import numpy as np

from ..motion import require_opencv

# Differences in CIE Lab, where 100 lies between black and white.
FOREGROUND_DIFFERENCE = 15.0
SMALLEST_CONTRAST = 30.0  # of a shape; every colour differs from every background by 44 or more
SHARE_OF_PEAK = 0.4  # of the largest difference nearby: less is an edge or a gap
NEIGHBOURHOOD = 3 / 64  # of the shorter side: what is nearby
FRINGE = 2 / 64  # of the shorter side: soft edges reach so far
SMALLEST_AREA = 0.005  # of the square on the shorter side; the smallest shape covers 0.02
MOST_BLOBS = 4


@dataclass(frozen=True)
class Blob:
    """One connected region of one frame.

    Attributes:
        frame: index of its frame.
        color: RGB, the median of its inside.
        center: (x, y) in pixels, weighted by coverage.
        area: pixels covered, partly covered ones in part.
        box: left, top, right, bottom in pixels.
        coverage: float32, how much of each pixel it covers, about 0 to 1 (noise is left in, so
            that it averages out), in a window around it.
        corner: (x, y) of the window's top left pixel.
    """

    frame: int
    color: np.ndarray
    center: np.ndarray
    area: float
    box: np.ndarray
    coverage: np.ndarray
    corner: np.ndarray


def to_lab(rgb: np.ndarray) -> np.ndarray:
    """RGB 0..255 (..., 3) -> float32 CIE Lab of the same shape."""
    cv2 = require_opencv()
    pixels = np.asarray(rgb, np.float32).reshape(1, -1, 3) / 255
    return cv2.cvtColor(pixels, cv2.COLOR_RGB2Lab).reshape(np.shape(rgb))


def find_blobs(index: int, frame: np.ndarray, background: np.ndarray) -> list[Blob]:
    """The (at most 4) largest regions of a frame, largest first.

    Args:
        index: the frame's number.
        frame: uint8 (H, W, 3).
        background: its RGB colour.
    """
    cv2 = require_opencv()
    difference = np.linalg.norm(to_lab(frame) - to_lab(background), axis=-1)
    unit = min(difference.shape)
    # Smoothing keeps single noisy pixels from joining or splitting regions.
    smooth = cv2.GaussianBlur(difference, (0, 0), 0.8 * max(unit / 64, 1))
    # Blur fills the gap between two shapes, but not to the height of either.
    peak = cv2.dilate(smooth, _square(round(NEIGHBOURHOOD * unit)))
    mask = smooth > np.maximum(FOREGROUND_DIFFERENCE, SHARE_OF_PEAK * peak)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(
        mask.astype(np.uint8), connectivity=4
    )
    fringe = max(round(FRINGE * unit), 1)
    from_background = frame - background.astype(np.float32)
    blobs = []
    for label in range(1, count):
        left, top, width, height, size = stats[label]
        if size < SMALLEST_AREA * unit * unit:
            continue
        corner = np.maximum([left - fringe, top - fringe], 0)
        window = slice(corner[1], top + height + fringe), slice(corner[0], left + width + fringe)
        core = labels[window] == label
        # The soft edge belongs to it too, unless it is another region's.
        region = cv2.dilate(core.astype(np.uint8), _square(fringe)) > 0
        region &= core | (labels[window] == 0)
        # Stains are fainter than shapes.
        if np.percentile(difference[window][core], 90) < SMALLEST_CONTRAST:
            continue
        coverage, contrast = _coverage(from_background[window], difference[window], region)
        blob = _blob(index, coverage, background + contrast, corner)
        if blob is not None and blob.area >= SMALLEST_AREA * unit * unit:
            blobs.append(blob)
    return sorted(blobs, key=lambda blob: -blob.area)[:MOST_BLOBS]


def _coverage(
    from_background: np.ndarray, difference: np.ndarray, region: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """How much of each pixel a region's shape covers, and its colour's difference in RGB.

    RGB, since edges and blur mix colours there, not in Lab.
    """
    inside = region & (difference >= 0.8 * np.percentile(difference[region], 90))
    contrast = np.median(from_background[inside], axis=0)
    share = from_background @ contrast / max(contrast @ contrast, 1)
    return np.where(region, share, 0).astype(np.float32), contrast


def _blob(index: int, coverage: np.ndarray, color: np.ndarray, corner: np.ndarray) -> Blob | None:
    """None where no pixel is covered by half."""
    rows, columns = np.nonzero(coverage >= 0.5)
    area = float(coverage.sum())
    if not len(rows) or area <= 0:
        return None
    height, width = coverage.shape
    x = coverage.sum(axis=0) @ (np.arange(width) + 0.5) / area
    y = coverage.sum(axis=1) @ (np.arange(height) + 0.5) / area
    box = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    return Blob(
        frame=index,
        color=color,
        center=corner + (x, y),
        area=area,
        box=box + np.tile(corner, 2),
        coverage=coverage,
        corner=corner,
    )


def _square(reach: int) -> np.ndarray:
    return np.ones((2 * reach + 1,) * 2, np.uint8)
