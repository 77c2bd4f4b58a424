"""Frames -> the shapes in them, followed through the clip."""

import itertools

import numpy as np

from .blobs import Blob, find_blobs


def track_shapes(frames: np.ndarray) -> tuple[np.ndarray, int, list[list[Blob]]]:
    """Find the shapes of a clip by their difference from its plain background.

    Args:
        frames: uint8 (T, H, W, 3).

    Returns:
        (background, count, tracks): the background's RGB colour, the most common number of shapes
        in a frame (at most 4), and for each shape its blobs in the frames that show that many.
    """
    background = np.median(frames.reshape(-1, 3), axis=0)
    blobs = [find_blobs(index, frame, background) for index, frame in enumerate(frames)]
    count = int(np.bincount([len(found) for found in blobs]).argmax())
    if count == 0:
        return background, 0, []
    complete = [found for found in blobs if len(found) == count]
    return background, count, _link(complete, min(frames.shape[1:3]))


def _link(frames: list[list[Blob]], unit: int) -> list[list[Blob]]:
    """Follow each blob of the first frame: near ones of like colour belong together."""
    tracks = [[blob] for blob in frames[0]]
    for found in frames[1:]:
        best = min(
            itertools.permutations(found),
            key=lambda order: sum(
                _distance(track[-1], blob, unit) for track, blob in zip(tracks, order, strict=True)
            ),
        )
        for track, blob in zip(tracks, best, strict=True):
            track.append(blob)
    return tracks


def _distance(before: Blob, after: Blob, unit: int) -> float:
    moved = np.linalg.norm(after.center - before.center) / unit
    return float(moved + np.linalg.norm(after.color - before.color) / 255)
