"""Fréchet distance between two sets of clips, on features made by hand.

No network is downloaded, so the numbers compare models of this world alone, not with published
FID or FVD. The distance falls as samples grow in number: compare only equal counts.
"""

from dataclasses import dataclass

import numpy as np

from nova.motion import require_opencv
from nova.shapes.blobs import to_lab

FLOW_SIDE = 64  # pixels that clips are brought to for optical flow
COLOR_SIDE = 16  # and for colours: averages over 4 x 4 pixels, which noise hardly changes
GRID = 4  # cells along a side
NUM_COMPONENTS = 32


def clip_features(frames: np.ndarray) -> np.ndarray:
    """What is where, and what moves where to, in 4 x 4 cells, averaged over time.

    Of each cell: colour in CIE Lab (3), change of colour from frame to frame (1: length of the
    difference in Lab), optical flow (2: x and y in pixels a frame).

    Args:
        frames: uint8 (T, H, W, 3), RGB, at least two frames.

    Returns:
        float64 (96,).
    """
    cv2 = require_opencv()
    lab = to_lab(_resized(frames, COLOR_SIDE))
    change = np.linalg.norm(np.diff(lab, axis=0), axis=-1, keepdims=True)
    gray = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in _resized(frames, FLOW_SIDE)]
    finder = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
    flow = np.stack([finder.calc(a, b, None) for a, b in zip(gray, gray[1:], strict=False)])
    return np.concatenate([_cell_means(maps) for maps in (lab, change, flow)])


def _resized(frames: np.ndarray, side: int) -> np.ndarray:
    cv2 = require_opencv()
    return np.stack([cv2.resize(f, (side, side), interpolation=cv2.INTER_AREA) for f in frames])


def _cell_means(maps: np.ndarray) -> np.ndarray:
    """(T, side, side, channels) -> (16 channels,): means over time and over each cell."""
    cell = maps.shape[1] // GRID
    mean = maps.mean(axis=0, dtype=np.float64)
    return mean.reshape(GRID, cell, GRID, cell, -1).mean(axis=(1, 3)).ravel()


@dataclass(frozen=True)
class FeatureSpace:
    """Standardised features on the principal components of a fixed set of real clips.

    So few dimensions that a few hundred clips tell their covariance.

    Attributes:
        mean, scale: (96,) of the features.
        components: (96, 32), orthonormal columns.
    """

    mean: np.ndarray
    scale: np.ndarray
    components: np.ndarray

    @classmethod
    def fit(cls, features: np.ndarray) -> "FeatureSpace":
        """Args: features (n, 96) of the fixed set, n well above 32."""
        mean, scale = features.mean(axis=0), features.std(axis=0)
        standardized = (features - mean) / scale
        _, _, rows = np.linalg.svd(standardized, full_matrices=False)
        return cls(mean, scale, rows[:NUM_COMPONENTS].T)

    def project(self, features: np.ndarray) -> np.ndarray:
        """(n, 96) -> (n, 32)."""
        return (features - self.mean) / self.scale @ self.components


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Squared Fréchet distance of two normal distributions with the samples' moments.

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)): Heusel et al. 2017 (arXiv 1706.08500), equation 6.
    The trace of (C1 C2)^(1/2) is that of the symmetric (C1^(1/2) C2 C1^(1/2))^(1/2).

    Args:
        first, second: (n, d) and (m, d), at least two samples each.
    """
    difference = first.mean(axis=0) - second.mean(axis=0)
    covariances = [np.cov(samples, rowvar=False) for samples in (first, second)]
    return gaussian_frechet_distance(difference, *covariances)


def gaussian_frechet_distance(
    difference: np.ndarray, first: np.ndarray, second: np.ndarray
) -> float:
    """The same from the difference of the means (d,) and the covariances (d, d)."""
    values, vectors = np.linalg.eigh(first)
    root = vectors * np.sqrt(np.clip(values, 0, None)) @ vectors.T
    # Rounding may bring eigenvalues of rank-deficient covariances below zero.
    crossed = np.clip(np.linalg.eigvalsh(root @ second @ root), 0, None)
    trace = np.trace(first) + np.trace(second) - 2 * np.sqrt(crossed).sum()
    return float(difference @ difference + trace)
