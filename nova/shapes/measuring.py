"""What a clip shows, measured on its frames alone: rendered, decoded or generated ones."""

from dataclasses import dataclass

import numpy as np

from ..media.pixels import check_clip
from ..motion import require_opencv
from .blobs import Blob, to_lab
from .motion_class import classify_motion
from .shape_class import classify_shape
from .tracking import track_shapes
from .vocabulary import BACKGROUNDS, COLORS, RELATIONS

LARGEST_SIDE = 128  # larger frames are shrunk to this shorter side: more tells nothing new

# A relation counts where it is seen in this share of the frames.
SHARE_OF_FRAMES = 0.9


@dataclass(frozen=True)
class ObjectMeasurement:
    """One shape of a clip. Lengths are in fractions of the frame's shorter side.

    Attributes:
        color: the nearest named colour.
        shape: the shape whose outline fits best.
        shape_fit: how well, as a correlation, at most 1.
        motion: the motion whose path fits best.
        speed: shorter sides a frame, along the path.
        growth: change of the radius, shorter sides a frame.
        times: (n,) the frames in which it was seen.
        centers: (n, 2) its centre, x and y (down).
        radii: (n,) radius of the circle of the same area.
        boxes: (n, 4) left, top, right, bottom.
    """

    color: str
    shape: str
    shape_fit: float
    motion: str
    speed: float
    growth: float
    times: np.ndarray
    centers: np.ndarray
    radii: np.ndarray
    boxes: np.ndarray


@dataclass(frozen=True)
class Measurement:
    """What was seen in a clip: its shapes, the largest first.

    `count` is the most common number of shapes in a frame; `background` the nearest named colour.
    """

    count: int
    background: str
    objects: tuple[ObjectMeasurement, ...]


def measure(frames: np.ndarray) -> Measurement:
    """Find the shapes of a clip by colour against its background, and follow them.

    Made for clips of this world, of 9 to 33 frames; it copes with blur, noise and compression.

    Args:
        frames: uint8 (T, H, W, 3), RGB.

    Raises:
        InputError: another shape or dtype, or no frames.
        DependencyError: OpenCV is not installed.
    """
    check_clip(frames)
    frames = _shrink(frames)
    unit = min(frames.shape[1:3])
    background, count, tracks = track_shapes(frames)
    objects = [_measure_object(track, unit) for track in tracks]
    return Measurement(count, _nearest_color(background, BACKGROUNDS), tuple(objects))


def relations_between(first: ObjectMeasurement, second: ObjectMeasurement) -> set[str]:
    """The relations of the first object to the second that are seen: none, one, or two if diagonal.

    One holds where the objects' boxes do not overlap along its axis.
    """
    _, a, b = np.intersect1d(first.times, second.times, return_indices=True)
    seen = set()
    for relation, (axis, first_in_front) in RELATIONS.items():
        front, back = first.boxes[a], second.boxes[b]
        if not first_in_front:
            front, back = back, front
        apart = front[:, axis + 2] <= back[:, axis]
        if len(apart) and apart.mean() >= SHARE_OF_FRAMES:
            seen.add(relation)
    return seen


def _measure_object(track: list[Blob], unit: int) -> ObjectMeasurement:
    times = np.array([blob.frame for blob in track])
    centers = np.array([blob.center for blob in track]) / unit
    radii = np.sqrt(np.array([blob.area for blob in track]) / np.pi) / unit
    shape, fit = classify_shape(track)
    motion, speed, growth = classify_motion(times, centers, radii)
    return ObjectMeasurement(
        color=_nearest_color(np.median([blob.color for blob in track], axis=0), COLORS),
        shape=shape,
        shape_fit=fit,
        motion=motion,
        speed=speed,
        growth=growth,
        times=times,
        centers=centers,
        radii=radii,
        boxes=np.array([blob.box for blob in track]) / unit,
    )


def _nearest_color(rgb: np.ndarray, named: dict[str, tuple[int, int, int]]) -> str:
    differences = np.linalg.norm(to_lab(list(named.values())) - to_lab(rgb), axis=-1)
    return list(named)[int(differences.argmin())]


def _shrink(frames: np.ndarray) -> np.ndarray:
    height, width = frames.shape[1:3]
    scale = LARGEST_SIDE / min(height, width)
    if scale >= 1:
        return frames
    cv2 = require_opencv()
    size = (round(width * scale), round(height * scale))
    return np.stack([cv2.resize(frame, size, interpolation=cv2.INTER_AREA) for frame in frames])
