"""Does a clip show what its scene says?"""

import itertools

from .measuring import Measurement, ObjectMeasurement, relations_between
from .scene import Scene, SceneObject
from .vocabulary import DIRECTIONS

Pair = tuple[SceneObject, ObjectMeasurement | None]


def check(scene: Scene, measurement: Measurement) -> dict[str, bool]:
    """Compare a scene with what was measured on a clip.

    Measured objects are matched to the scene's by colour, then by shape and motion.

    Returns:
        "count": as many shapes as in the scene. "background": its colour, which captions may leave
        out. "color", "shape", "motion": right for every object of the scene. "direction", where
        objects move in one of the eight directions: right for each of these. "relation", where
        there are two: it holds throughout.
    """
    pairs = _match(scene, measurement)
    heading = [pair for pair in pairs if pair[0].motion in DIRECTIONS]
    result = {
        "count": measurement.count == len(scene.objects),
        "background": measurement.background == scene.background,
        "color": all(_agrees(pair, "color") for pair in pairs),
        "shape": all(_agrees(pair, "shape") for pair in pairs),
        "motion": all(_agrees(pair, "motion") for pair in pairs),
    }
    if heading:
        result["direction"] = all(_agrees(pair, "motion") for pair in heading)
    if scene.relation is not None:
        seen = [measured for _, measured in pairs if measured is not None]
        result["relation"] = len(seen) == 2 and scene.relation in relations_between(*seen)
    return result


def _match(scene: Scene, measurement: Measurement) -> list[Pair]:
    missing = [None] * max(len(scene.objects) - len(measurement.objects), 0)
    candidates = [*measurement.objects, *missing]

    def score(pairs: list[Pair]) -> tuple[int, ...]:
        return tuple(
            sum(_agrees(pair, name) for pair in pairs) for name in ("color", "shape", "motion")
        )

    choices = itertools.permutations(candidates, len(scene.objects))
    return max((list(zip(scene.objects, choice, strict=True)) for choice in choices), key=score)


def _agrees(pair: Pair, name: str) -> bool:
    wanted, measured = pair
    return measured is not None and getattr(wanted, name) == getattr(measured, name)
