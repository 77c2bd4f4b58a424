"""Random scenes."""

from collections.abc import Sequence

import numpy as np

from ..errors import InputError
from .geometry import SHAPES
from .paths import fits
from .scene import Scene, SceneObject, is_held_out
from .vocabulary import (
    BACKGROUNDS,
    BOUNCES,
    COLORS,
    GROWTHS,
    MOTIONS,
    REFERENCE_FRAMES,
    RELATIONS,
    SIZES,
    SPEEDS,
    unit_vector,
)

REFERENCE_SIDE = 64
MAX_ATTEMPTS = 10_000


def sample_scene(
    rng: np.random.Generator,
    *,
    held_out: bool | None = False,
    num_objects: int | None = None,
    motions: Sequence[str] = MOTIONS,
    two_objects: float = 0.4,
) -> Scene:
    """Draw a scene whose motions have room in 17 square frames.

    Every choice is uniform, except that in every other scene of two shapes the second stands
    still (where `motions` has "still").

    Args:
        rng: the only source of chance.
        held_out: False for training scenes, True for the test split (`is_held_out`), None for
            either.
        num_objects: 1 or 2; None draws it.
        motions: which motions may occur.
        two_objects: how often a scene has two shapes, where `num_objects` is None.

    Raises:
        InputError: unknown motions, an impossible count, or no scene fulfils the conditions.
    """
    unknown = sorted(set(motions) - set(MOTIONS))
    if unknown or not motions:
        raise InputError(f"motions must be some of {list(MOTIONS)}, got {list(motions)}")
    if num_objects not in (None, 1, 2):
        raise InputError(f"num_objects must be 1, 2 or None, got {num_objects}")
    count = num_objects or (2 if rng.random() < two_objects else 1)
    for _ in range(MAX_ATTEMPTS):
        scene = _draw(rng, count, motions)
        if held_out is not None and is_held_out(scene) != held_out:
            continue
        if _bounces_off_the_frame(scene) and fits(scene, REFERENCE_FRAMES, *[REFERENCE_SIDE] * 2):
            return scene
    raise InputError(f"no scene of {count} objects was found with the motions {list(motions)}")


def _draw(rng: np.random.Generator, count: int, motions: Sequence[str]) -> Scene:
    colors = rng.permutation(list(COLORS))[:count]
    drawn = [_choice(rng, motions) for _ in range(count)]
    if count == 2 and "still" in motions and rng.random() < 0.5:
        drawn[1] = "still"
    return Scene(
        objects=tuple(
            SceneObject(
                shape=_choice(rng, SHAPES),
                color=str(color),
                motion=motion,
                size=None if motion in GROWTHS else _choice(rng, SIZES),
                speed=None if motion == "still" else _choice(rng, SPEEDS),
                place=(float(rng.random()), float(rng.random())),
                phase=float(rng.random()),
            )
            for color, motion in zip(colors, drawn, strict=True)
        ),
        background=_choice(rng, BACKGROUNDS),
        relation=_choice(rng, RELATIONS) if count == 2 else None,
        split=float(rng.random()),
    )


def _choice(rng: np.random.Generator, words: Sequence[str]) -> str:
    words = list(words)
    return words[rng.integers(len(words))]


def _bounces_off_the_frame(scene: Scene) -> bool:
    """No shape has to turn round at the line between the two, where there is nothing to see."""
    if scene.relation is None:
        return True
    axis, first_in_front = RELATIONS[scene.relation]
    for thing, in_front in zip(scene.objects, (first_in_front, not first_in_front), strict=True):
        if thing.motion in BOUNCES:
            towards = unit_vector(thing.direction)[axis]
            if towards > 0 and in_front or towards < 0 and not in_front:
                return False
    return True
