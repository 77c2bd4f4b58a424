"""How often the measuring is right, on clips of which all is known: a benchmark's ceiling."""

from collections import defaultdict
from collections.abc import Callable

import numpy as np

from ..motion import require_opencv
from .checking import check
from .dataset import ShapesDataset
from .measuring import measure

JPEG_QUALITY = 60


def degrade(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What a small VAE or a codec may do: Gaussian blur (up to one pixel at 64), noise, JPEG."""
    cv2 = require_opencv()
    blur = rng.uniform(0.3, 1.0) * min(frames.shape[1:3]) / 64
    result = np.empty_like(frames)
    for index, frame in enumerate(frames):
        soft = cv2.GaussianBlur(frame, (0, 0), blur)
        noisy = np.clip(soft + rng.normal(0, 6, frame.shape), 0, 255).astype(np.uint8)
        _, data = cv2.imencode(".jpg", noisy, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
        result[index] = cv2.imdecode(data, cv2.IMREAD_COLOR)
    return result


def measuring_accuracy(
    count: int,
    *,
    seed: int = 0,
    change: Callable[[np.ndarray, np.random.Generator], np.ndarray] | None = None,
    shuffled: bool = False,
    num_frames: int = 17,
    side: int = 64,
) -> dict[str, float]:
    """Share of random clips on which each entry of `check` is true.

    Args:
        count: number of clips.
        change: what is done to the frames before measuring, such as `degrade`.
        shuffled: compare each clip with the scene of the next one: the floor.
        num_frames, side: of the square clips.
    """
    clips = ShapesDataset(seed, count, num_frames, side, side, held_out=None)
    rng = np.random.default_rng(seed)
    scenes, measurements = [], []
    for frames, _, scene in clips:
        scenes.append(scene)
        measurements.append(measure(frames if change is None else change(frames, rng)))
    if shuffled:
        scenes = scenes[1:] + scenes[:1]
    outcomes = defaultdict(list)
    for scene, measurement in zip(scenes, measurements, strict=True):
        for name, right in check(scene, measurement).items():
            outcomes[name].append(right)
    return {name: float(np.mean(values)) for name, values in outcomes.items()}
