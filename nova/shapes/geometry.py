"""Outlines of the shapes and their signed distance: how far a point is outside (negative: inside).

An outline is for radius 1, with the centre of its area at the origin and y down.
"""

import math

import numpy as np


def _regular(radius: float, count: int, first_angle: float) -> np.ndarray:
    angles = math.radians(first_angle) + 2 * math.pi * np.arange(count) / count
    return radius * np.stack([np.cos(angles), -np.sin(angles)], axis=1)


def _star(radius: float, inner_radius: float) -> np.ndarray:
    points = np.empty((10, 2))
    points[0::2] = _regular(radius, 5, 90)
    points[1::2] = _regular(inner_radius, 5, 90 + 36)
    return points


def _cross(reach: float, half_width: float) -> np.ndarray:
    a, b = reach, half_width
    return np.array(
        [(b, -a), (b, -b), (a, -b), (a, b), (b, b), (b, a)]
        + [(-b, a), (-b, b), (-a, b), (-a, -b), (-b, -b), (-b, -a)]
    )


# The factors make the shapes look equally large: something between equal width and equal area.
POLYGONS = {
    "square": _regular(0.92 * math.sqrt(2), 4, 45),
    "triangle": _regular(1.35, 3, 90),
    "star": _star(1.4, 0.6),
    "diamond": _regular(1.3, 4, 90),
    "cross": _cross(1.2, 0.4),
}
SHAPES = ("circle", *POLYGONS)


def extents(shape: str) -> np.ndarray:
    """How far a shape of radius 1 reaches from its centre: [[left, up], [right, down]]."""
    if shape == "circle":
        return np.ones((2, 2))
    points = POLYGONS[shape]
    return np.stack([-points.min(axis=0), points.max(axis=0)])


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Distance of points from the outline of a shape of radius 1, negative inside.

    Args:
        shape: one of `SHAPES`.
        x, y: coordinates of the points, arrays of any one shape, y down.

    Returns:
        Array of that shape and dtype.
    """
    if shape == "circle":
        return np.sqrt(x * x + y * y) - 1
    nearest = np.full_like(x, np.inf)
    inside = np.zeros(x.shape, bool)
    points = POLYGONS[shape].astype(x.dtype)
    for start, end in zip(points, np.roll(points, -1, axis=0), strict=True):
        edge_x, edge_y = end - start
        from_x, from_y = x - start[0], y - start[1]
        along = (from_x * edge_x + from_y * edge_y) / (edge_x * edge_x + edge_y * edge_y)
        np.clip(along, 0, 1, out=along)
        squared = (from_x - edge_x * along) ** 2 + (from_y - edge_y * along) ** 2
        np.minimum(nearest, squared, out=nearest)
        # Even-odd rule: a ray to the right crosses this edge.
        spans = (y >= start[1]) != (y >= end[1])
        if edge_y != 0:
            inside ^= spans & (from_x < from_y * (edge_x / edge_y))
    return np.where(inside, -1, 1) * np.sqrt(nearest)
