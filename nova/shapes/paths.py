"""Where every shape is in every frame, for any frame size and length.

A scene of two shapes is cut by a straight line across the axis of their relation, and each keeps
its own side of it: this is what makes the relation true in every frame. Inside its side (a single
shape: inside the frame) a shape's start is chosen such that it never leaves. Where a clip is too
long for its motion, a shape that moves in a direction comes to rest, and one that grows stops
growing.
"""

import math

import numpy as np

from .geometry import extents
from .scene import Scene, SceneObject
from .vocabulary import (
    BOUNCES,
    GAP,
    GROWTH_SPEEDS,
    GROWTHS,
    LARGEST_RADIUS,
    MARGIN,
    ORBIT_RADIUS,
    RELATIONS,
    SIZES,
    SMALLEST_RADIUS,
    SPEEDS,
    TURNS,
    unit_vector,
)

# Share of the clip after which a bouncing shape meets the border, for phase 0 and 1.
BOUNCE_TIMES = (0.35, 0.65)


def paths(scene: Scene, num_frames: int, height: int, width: int) -> np.ndarray:
    """Positions and radii in pixels.

    Returns:
        float64 (objects, num_frames, 3): x (to the right) and y (down) of the centre, radius.
        Pixel (row, column) covers y in [row, row + 1], x in [column, column + 1].
    """
    unit = min(height, width)
    result = np.empty((len(scene.objects), num_frames, 3))
    boxes = _boxes(scene, num_frames, height, width)
    for thing, box, path in zip(scene.objects, boxes, result, strict=True):
        largest = ((box[1] - box[0]) / extents(thing.shape).sum(axis=0)).min()
        path[:, 2] = np.minimum(_radii(thing, num_frames) * unit, largest)
        left_up, right_down = extents(thing.shape) * path[:, 2].max()
        low, high = box[0] + left_up, box[1] - right_down
        middle = (low + high) / 2
        low, high = np.minimum(low, middle), np.maximum(high, middle)
        path[:, :2] = _centers(thing, low, high, num_frames, unit)
    return result


def fits(scene: Scene, num_frames: int, height: int, width: int) -> bool:
    """Whether all motions have the room that they need, so that nothing comes to rest early."""
    spans = [_span(thing, num_frames, min(height, width)) for thing in scene.objects]
    margin = MARGIN * min(height, width)
    room = np.array([width, height]) - 2 * margin
    if any((span > room).any() for span in spans):
        return False
    if scene.relation is None:
        return True
    axis, _ = RELATIONS[scene.relation]
    gap = GAP * min(height, width)
    return spans[0][axis] + spans[1][axis] + gap <= room[axis]


def _boxes(scene: Scene, num_frames: int, height: int, width: int) -> list[np.ndarray]:
    """The part of the frame that each shape keeps to: [[left, top], [right, bottom]]."""
    unit = min(height, width)
    margin = MARGIN * unit
    whole = np.array([[margin, margin], [width - margin, height - margin]])
    if scene.relation is None:
        return [whole]
    axis, first_in_front = RELATIONS[scene.relation]
    spans = [_span(thing, num_frames, unit)[axis] for thing in scene.objects]
    sizes = [_smallest_size(thing, unit)[axis] for thing in scene.objects]
    share = scene.split
    if not first_in_front:
        spans, sizes, share = spans[::-1], sizes[::-1], 1 - share
    gap = GAP * unit
    available = whole[1, axis] - whole[0, axis] - gap
    free = available - sum(spans)
    if free >= 0:
        front = spans[0] + share * free
    elif available >= sum(sizes):  # Both have less room to move or grow, in proportion.
        wanted = sum(spans) - sum(sizes)
        front = sizes[0] + (available - sum(sizes)) * (spans[0] - sizes[0]) / wanted
    else:  # Both are drawn smaller, in proportion.
        front = sizes[0] * available / sum(sizes)
    boxes = [whole.copy(), whole.copy()]
    boxes[0][1, axis] = whole[0, axis] + front
    boxes[1][0, axis] = whole[0, axis] + front + gap
    return boxes if first_in_front else boxes[::-1]


def _span(thing: SceneObject, num_frames: int, unit: int) -> np.ndarray:
    """Width and height in pixels that a shape needs for its whole motion."""
    size = extents(thing.shape).sum(axis=0) * _radii(thing, num_frames).max()
    travel = np.zeros(2)
    if thing.motion in TURNS:
        travel[:] = 2 * ORBIT_RADIUS
    elif thing.direction is not None:
        length = SPEEDS[thing.speed] * (num_frames - 1)
        if thing.motion in BOUNCES:
            share = _bounce_time(thing)
            length *= max(share, 1 - share)
        travel = length * np.abs(unit_vector(thing.direction))
    return (size + travel) * unit


def _smallest_size(thing: SceneObject, unit: int) -> np.ndarray:
    """Width and height in pixels of a shape, of a growing or shrinking one at its smallest."""
    radius = SMALLEST_RADIUS if thing.motion in GROWTHS else SIZES[thing.size]
    return extents(thing.shape).sum(axis=0) * radius * unit


def _radii(thing: SceneObject, num_frames: int) -> np.ndarray:
    """Radius in every frame, as a fraction of the frame's shorter side."""
    if thing.motion not in GROWTHS:
        return np.full(num_frames, SIZES[thing.size])
    radii = SMALLEST_RADIUS + GROWTH_SPEEDS[thing.speed] * np.arange(num_frames)
    radii = np.minimum(radii, LARGEST_RADIUS)
    return radii if thing.motion == "growing" else radii[::-1]


def _bounce_time(thing: SceneObject) -> float:
    early, late = BOUNCE_TIMES
    return early + (late - early) * thing.phase


def _centers(
    thing: SceneObject, low: np.ndarray, high: np.ndarray, num_frames: int, unit: int
) -> np.ndarray:
    """Centre of the shape in every frame, (num_frames, 2), between `low` and `high`."""
    time = np.arange(num_frames)[:, None]
    place = np.array(thing.place)
    room = high - low
    if thing.motion in TURNS:
        return _circling(thing, low, high, time, unit)
    if thing.direction is None:
        return np.broadcast_to(low + place * room, (num_frames, 2))
    speed = SPEEDS[thing.speed] * unit
    direction = np.array(unit_vector(thing.direction))
    if thing.motion in BOUNCES:
        return _bouncing(thing, low, high, speed * time, speed * (num_frames - 1), direction)
    moving = direction != 0
    travel = min(speed * (num_frames - 1), (room[moving] / np.abs(direction[moving])).min())
    # Starts from which the whole way stays between low and high.
    first = low - np.minimum(direction * travel, 0)
    last = high - np.maximum(direction * travel, 0)
    return first + place * (last - first) + direction * np.minimum(speed * time, travel)


def _circling(
    thing: SceneObject, low: np.ndarray, high: np.ndarray, time: np.ndarray, unit: int
) -> np.ndarray:
    radius = min(ORBIT_RADIUS * unit, (high - low).min() / 2)
    center = low + radius + np.array(thing.place) * (high - low - 2 * radius)
    turn = SPEEDS[thing.speed] / ORBIT_RADIUS * time
    # With y down, a growing angle turns clockwise.
    angle = 2 * math.pi * thing.phase + (turn if thing.motion == "clockwise" else -turn)
    return center + radius * np.concatenate([np.cos(angle), np.sin(angle)], axis=1)


def _bouncing(
    thing: SceneObject,
    low: np.ndarray,
    high: np.ndarray,
    way: np.ndarray,
    whole_way: float,
    direction: np.ndarray,
) -> np.ndarray:
    axis = int(np.abs(direction).argmax())
    centers = np.broadcast_to(low + np.array(thing.place) * (high - low), (len(way), 2)).copy()
    room = max(high[axis] - low[axis], 1e-6)
    start = min(_bounce_time(thing) * whole_way, room)
    # The distance to the border runs to zero and back, and in long clips turns at the far end too.
    distance = np.abs((start - way[:, 0] + room) % (2 * room) - room)
    centers[:, axis] = high[axis] - distance if direction[axis] > 0 else low[axis] + distance
    return centers
