"""A scene: what is in a clip. Frozen, independent of frame size and length."""

from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from .geometry import SHAPES
from .vocabulary import (
    BACKGROUNDS,
    BOUNCES,
    COLORS,
    DIRECTIONS,
    GROWTHS,
    MOTIONS,
    RELATIONS,
    SIZES,
    SPEEDS,
)

HELD_OUT_MODULUS = 10


@dataclass(frozen=True)
class SceneObject:
    """One shape and what it does; the words are those of `nova.shapes.vocabulary`.

    `size` is None for a shape that grows or shrinks, `speed` for one that stands still.
    `place` says where in the room that its motion leaves it starts: (0, 0) top left, (1, 1) bottom
    right. `phase` in [0, 1): where on its circle a circling shape starts, and how late in the clip
    a bouncing one meets the border; other motions do not use it.
    """

    shape: str
    color: str
    motion: str
    size: str | None
    speed: str | None
    place: tuple[float, float] = (0.5, 0.5)
    phase: float = 0.5

    def __post_init__(self) -> None:
        _require("shape", self.shape, SHAPES)
        _require("color", self.color, COLORS)
        _require("motion", self.motion, MOTIONS)
        _require("size", self.size, (None,) if self.motion in GROWTHS else SIZES)
        _require("speed", self.speed, (None,) if self.motion == "still" else SPEEDS)
        if not all(0 <= value <= 1 for value in (*self.place, self.phase)):
            raise InputError(f"place {self.place} and phase {self.phase} must lie in 0..1")

    @property
    def direction(self) -> int | None:
        """Angle in degrees that it (first) moves in, counter-clockwise from the right, or None."""
        return {**DIRECTIONS, **BOUNCES}.get(self.motion)


@dataclass(frozen=True)
class Scene:
    """One or two shapes of different colours on a plain background.

    `relation` is that of the first shape to the second, None for a single shape. `split` in [0, 1]
    shares the room that neither of the two needs.
    """

    objects: tuple[SceneObject, ...]
    background: str
    relation: str | None = None
    split: float = 0.5

    def __post_init__(self) -> None:
        _require("background", self.background, BACKGROUNDS)
        if len(self.objects) not in (1, 2):
            raise InputError(f"a scene has one or two objects, got {len(self.objects)}")
        _require("relation", self.relation, RELATIONS if len(self.objects) == 2 else (None,))
        if not 0 <= self.split <= 1:
            raise InputError(f"split must lie in 0..1, got {self.split}")
        if len({thing.color for thing in self.objects}) < len(self.objects):
            raise InputError("the two objects of a scene must differ in color")


def facts(scene: Scene) -> dict[str, Any]:
    """All that is known about a scene's clips, as a dictionary that JSON can hold.

    `direction` is the angle in degrees (0 right, 90 up) that a shape moves in, for a bouncing one
    before it meets the border, and None for other motions.
    """
    return {
        "count": len(scene.objects),
        "background": scene.background,
        "relation": scene.relation,
        "objects": [
            {
                "color": thing.color,
                "shape": thing.shape,
                "size": thing.size,
                "motion": thing.motion,
                "speed": thing.speed,
                "direction": thing.direction,
            }
            for thing in scene.objects
        ],
    }


def is_held_out(scene: Scene) -> bool:
    """Whether a scene belongs to the test split: an object has a held-out combination.

    A tenth of the combinations colour x shape x motion are held out, spread so evenly that every
    pair (colour and shape, shape and motion, colour and motion) is trained on.
    """
    return any(_is_held_out(thing) for thing in scene.objects)


def _is_held_out(thing: SceneObject) -> bool:
    number = (
        3 * list(COLORS).index(thing.color)
        + 7 * SHAPES.index(thing.shape)
        + MOTIONS.index(thing.motion)
    )
    return number % HELD_OUT_MODULUS == 0


def _require(name: str, value: Any, allowed: Any) -> None:
    if value not in allowed:
        raise InputError(f"{name} must be one of {list(allowed)}, got {value!r}")
