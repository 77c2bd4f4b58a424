"""Which shape a blob is: its mean outline, brought to one size, compared with each shape's."""

from functools import cache

import numpy as np

from ..motion import require_opencv
from .blobs import Blob
from .geometry import SHAPES, signed_distance

GRID = 48  # side of the canonical picture, pixels
CANONICAL_AREA = 450.0  # of every shape in it, so that the widest (the star) just fits
BLURS = (0.0, 1.0, 2.0, 3.0)  # standard deviations: small and soft shapes have blurred outlines


def classify_shape(blobs: list[Blob]) -> tuple[str, float]:
    """The shape that the mean outline of the blobs is most like.

    Returns:
        (shape, fit): one of `SHAPES`, and the correlation of outline and shape, at most 1.
    """
    outlines = [_canonical(b.coverage, b.center - b.corner, b.area) for b in blobs]
    outline = _standardized(np.clip(np.mean(outlines, axis=0), 0, 1))
    fits = {
        shape: max(float((outline * template).sum()) for template in _templates(shape))
        for shape in SHAPES
    }
    best = max(fits, key=fits.get)
    return best, fits[best]


@cache
def _templates(shape: str) -> tuple[np.ndarray, ...]:
    side, radius = 8 * GRID, 2 * GRID
    pixel = (np.arange(side) + 0.5 - side / 2) / radius
    x, y = np.meshgrid(pixel, pixel)
    coverage = np.clip(0.5 - signed_distance(shape, x, y) * radius, 0, 1).astype(np.float32)
    sharp = _canonical(coverage, np.array([side / 2, side / 2]), float(coverage.sum()))
    cv2 = require_opencv()
    return tuple(
        _standardized(cv2.GaussianBlur(sharp, (0, 0), blur) if blur else sharp) for blur in BLURS
    )


def _standardized(picture: np.ndarray) -> np.ndarray:
    """Mean 0, length 1, so that a sum of products is a correlation."""
    picture = picture - picture.mean()
    return picture / max(np.linalg.norm(picture), 1e-6)


def _canonical(coverage: np.ndarray, center: np.ndarray, area: float) -> np.ndarray:
    """Coverage moved and scaled to the middle of a GRID x GRID picture, with the common area."""
    cv2 = require_opencv()
    scale = float(np.sqrt(CANONICAL_AREA / area))
    if scale < 1:  # averaging over what falls into a pixel, which sampling alone would skip
        coverage = cv2.GaussianBlur(coverage, (0, 0), 0.4 / scale)
    # Pixel centres are at half-integers here and at integers in OpenCV.
    shift = GRID / 2 - scale * center + 0.5 * scale - 0.5
    matrix = np.array([[scale, 0, shift[0]], [0, scale, shift[1]]])
    return cv2.warpAffine(coverage, matrix, (GRID, GRID), flags=cv2.INTER_LINEAR)
