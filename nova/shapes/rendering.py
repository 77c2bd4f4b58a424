"""Scenes -> frames, anti-aliased: a pixel's colour is mixed by how much of it a shape covers."""

import math

import numpy as np

from ..errors import InputError
from .geometry import signed_distance
from .paths import paths
from .scene import Scene
from .vocabulary import BACKGROUNDS, COLORS

SMALLEST_SIDE = 16  # pixels; below, shapes are dots


def render(scene: Scene, num_frames: int, height: int, width: int) -> np.ndarray:
    """Draw a scene's clip.

    Args:
        scene: what to draw; the same scene can be drawn at any size and length.
        num_frames: at least 1, at 12 frames a second.
        height, width: pixels, at least 16.

    Returns:
        uint8 (num_frames, height, width, 3), RGB.

    Raises:
        InputError: a count or size that is too small.
    """
    if num_frames < 1 or min(height, width) < SMALLEST_SIDE:
        raise InputError(
            f"a clip needs at least 1 frame of {SMALLEST_SIDE} x {SMALLEST_SIDE} pixels, got "
            f"{num_frames} of {height} x {width}"
        )
    frames = np.empty((num_frames, height, width, 3), np.uint8)
    background = np.array(BACKGROUNDS[scene.background], np.float32)
    frames[:] = background.astype(np.uint8)
    for thing, path in zip(scene.objects, paths(scene, num_frames, height, width), strict=True):
        color = np.array(COLORS[thing.color], np.float32)
        _draw(frames, thing.shape, path.astype(np.float32), color, background)
    return frames


def _draw(
    frames: np.ndarray, shape: str, path: np.ndarray, color: np.ndarray, background: np.ndarray
) -> None:
    """Paint one shape into all frames, working on a window around it."""
    height, width = frames.shape[1:3]
    x, y, radius = (path[:, None, None, k] for k in range(3))
    side = 2 * math.ceil(1.5 * path[:, 2].max() + 1)  # no shape reaches 1.5 radii
    left = np.floor(path[:, 0]).astype(int) - side // 2
    top = np.floor(path[:, 1]).astype(int) - side // 2
    pixel = np.arange(side, dtype=np.float32) + 0.5
    columns = left[:, None, None] + pixel
    rows = top[:, None, None] + pixel[:, None]
    from_x, from_y = np.broadcast_arrays((columns - x) / radius, (rows - y) / radius)
    distance = signed_distance(shape, from_x, from_y) * radius
    # A straight edge at distance d from a pixel's centre covers about 0.5 - d of it.
    coverage = np.clip(0.5 - distance, 0, 1)
    touched = coverage > 0
    painted = background + coverage[..., None] * (color - background)
    painted = (painted + 0.5).astype(np.uint8)
    for index, (frame_row, frame_column) in enumerate(zip(top, left, strict=True)):
        # The window may reach beyond the frame, though the shape does not.
        rows = slice(max(-frame_row, 0), min(side, height - frame_row))
        columns = slice(max(-frame_column, 0), min(side, width - frame_column))
        target = frames[
            index,
            frame_row + rows.start : frame_row + rows.stop,
            frame_column + columns.start : frame_column + columns.stop,
        ]
        # Windows of two shapes may overlap, though the shapes do not.
        seen = touched[index, rows, columns]
        target[seen] = painted[index, rows, columns][seen]
