"""The test cases: what a model is asked for, and the real clip that the words belong to.

Case i of a split is the same whatever else is measured, in whatever batches. Real clips are drawn
with another seed than those of training; of the new combinations, training had no clip at all.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from nova import shapes
from nova.motion import motion_score
from nova.shapes.paths import fits
from nova.shapes.vocabulary import BOUNCES, DIRECTIONS, SIZES, SPEEDS, TURNS

TRAINING_SEED = 0
NEW_CAPTIONS, NEW_COMBINATIONS, SWEPT = "new captions", "new combinations", "swept"
# Split -> `held_out` of `nova.shapes.clip`.
SPLITS = {NEW_CAPTIONS: False, NEW_COMBINATIONS: True}

SWEPT_MOTIONS = (*DIRECTIONS, *TURNS, *BOUNCES)
# Multiples of it, modulo 1, fill the range from 0 to 1 evenly however many are taken.
GOLDEN_RATIO = (5**0.5 - 1) / 2
LEAST_SPEED = 1 / 640  # a tenth of a slow shape's, in shorter sides a frame


@dataclass(frozen=True)
class Case:
    """One clip to generate.

    Attributes:
        index: its number in its split.
        caption: the prompt.
        scene: what the caption is about.
        frames: uint8 (T, H, W, 3), a real clip of the scene.
        motion: motion score that is asked for.
        seed: of the model's noise.
    """

    index: int
    caption: str
    scene: shapes.Scene
    frames: np.ndarray
    motion: float
    seed: int


def draw_case(
    split: str, seed: int, index: int, num_frames: int, size: tuple[int, int], scored_frames: int
) -> Case:
    """Case `index` of a split.

    Args:
        split: a key of `SPLITS`.
        num_frames: pixel frames of the real clip.
        size: height and width in pixels.
        scored_frames: the score asked for is that of so many frames from the first on: what
            training saw of a clip.
    """
    height, width = size
    frames, caption, scene = shapes.clip(
        seed, index, num_frames=num_frames, height=height, width=width, held_out=SPLITS[split]
    )
    score = motion_score(frames[:scored_frames], shapes.FPS)
    return Case(index, caption, scene, frames, score, _noise_seed(split, seed, index))


def draw_swept_case(
    seed: int, index: int, num_frames: int, size: tuple[int, int], scores: tuple[float, float]
) -> Case:
    """Case `index` of those whose score does not follow from their caption.

    A single shape that moves across the frame, described without its speed and size, and a score
    from the range `scores` that has nothing to do with the scene. (With two shapes, or one that
    grows, the caption alone would bound the score: even the best clip could not follow it.)
    """
    rng = np.random.default_rng((seed, index))
    scene = shapes.sample_scene(rng, num_objects=1, motions=SWEPT_MOTIONS)
    low, high = scores
    asked = low + (high - low) * (index * GOLDEN_RATIO % 1)
    frames = shapes.render(scene, num_frames, *size)
    caption = shapes.describe(scene)
    return Case(index, caption, scene, frames, asked, _noise_seed(SWEPT, seed, index))


def nearest_possible_score(case: Case) -> float:
    """The score nearest to the one asked for among real clips that the swept caption allows."""
    scores = [motion_score(clip, shapes.FPS) for clip in _renditions(case, case.scene.background)]
    return min(scores, key=lambda score: abs(score - case.motion))


def score_without_flicker(case: Case, frames: np.ndarray) -> float:
    """Score of the real clip of a swept caption that is most like a generated one.

    It has the background, and of all sizes and speeds those nearest to what is measured on `frames`
    uint8 (T, H, W, 3); so it moves as that clip does, without the wobbling of generated outlines,
    which optical flow counts as motion. Where no shape is seen, the score of `frames`.
    """
    seen = shapes.measure(frames)
    if not seen.objects:
        return motion_score(frames, shapes.FPS)
    wanted = _size_and_speed(seen)

    def difference(clip: np.ndarray) -> float:
        return float(np.abs(_size_and_speed(shapes.measure(clip)) - wanted).sum())

    return motion_score(min(_renditions(case, seen.background), key=difference), shapes.FPS)


def _renditions(case: Case, background: str) -> Iterator[np.ndarray]:
    """Real clips of a swept case in all sizes and speeds for which its motion has room."""
    (thing,) = case.scene.objects
    num_frames, *size = case.frames.shape[:3]
    for shape_size, speed in itertools.product(SIZES, SPEEDS):
        changed = dataclasses.replace(thing, size=shape_size, speed=speed)
        scene = dataclasses.replace(case.scene, objects=(changed,), background=background)
        if changed == thing or fits(scene, num_frames, *size):
            yield shapes.render(scene, num_frames, *size)


def _size_and_speed(seen: shapes.Measurement) -> np.ndarray:
    """Logarithms of the largest shape's radius and speed."""
    shape = seen.objects[0]
    return np.log([np.median(shape.radii), max(shape.speed, LEAST_SPEED)])


def _noise_seed(kind: str, seed: int, index: int) -> int:
    """Noise differs between the cases of one kind and between kinds."""
    stream = (NEW_CAPTIONS, NEW_COMBINATIONS, SWEPT).index(kind)
    return int(np.random.SeedSequence((seed, stream, index)).generate_state(1)[0])
