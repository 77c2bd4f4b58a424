"""Captions: a small grammar. A caption may leave facts out, and what it states is true.

The one thing left unsaid that means something: a second shape without a motion stands still.
"""

import numpy as np

from .scene import Scene, SceneObject
from .vocabulary import DIRECTIONS

SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
SPEED_WORDS = {"slow": ("slowly",), "fast": ("quickly", "rapidly")}
RELATION_WORDS = {
    "above": ("above",),
    "below": ("below", "under"),
    "left of": ("to the left of", "left of"),
    "right of": ("to the right of", "right of"),
}
BACKGROUND_WORDS = ("on a {} background", "against a {} background")

# Verbs as (participle, present), and what follows them; {} is where an adverb goes.
MOVE = (("moving", "moves"), ("sliding", "slides"), ("gliding", "glides"))
_SIDES = {"left": "left", "right": "right", "up": "top", "down": "bottom"}
Phrases = list[tuple[tuple[tuple[str, str], ...], tuple[str, ...]]]


def _direction_phrases(name: str) -> Phrases:
    if " " in name:
        vertical, horizontal = name.split()
        corner = "upper" if vertical == "up" else "lower"
        return [
            (
                MOVE,
                (
                    f"{{}} {vertical} and {horizontal}",
                    f"{{}} diagonally {vertical} and {horizontal}",
                    f"{{}} towards the {corner} {horizontal}",
                ),
            )
        ]
    if name in ("left", "right"):
        return [(MOVE, (f"{{}} {name}", f"{{}} to the {name}"))]
    special = ("rising", "rises") if name == "up" else ("falling", "falls")
    return [(MOVE, (f"{{}} {name}", f"{{}} {name}wards")), ((special,), ("{}",))]


def _turn_phrases(name: str) -> Phrases:
    return [
        ((("circling", "circles"),), (f"{{}} {name}",)),
        (MOVE[:1], (f"{{}} in a {name} circle",)),
    ]


def _bounce_phrases(side: str) -> Phrases:
    return [
        ((("bouncing", "bounces"),), (f"{{}} off the {side} edge", f"{{}} off the {side} border"))
    ]


# The first verb and the first complement are the canonical ones.
PHRASES: dict[str, Phrases] = {
    "still": [
        ((("standing still", "stands still"), ("staying in place", "stays in place")), ("",)),
        ((("not moving", "does not move"),), ("",)),
    ],
    **{name: _direction_phrases(name) for name in DIRECTIONS},
    "clockwise": _turn_phrases("clockwise"),
    "counterclockwise": _turn_phrases("counterclockwise"),
    "growing": [
        ((("growing", "grows"),), ("{}", " larger{}")),
        ((("getting", "gets"),), (" bigger{}",)),
    ],
    "shrinking": [
        ((("shrinking", "shrinks"),), ("{}",)),
        ((("getting", "gets"),), (" smaller{}",)),
    ],
    **{f"bounce {way}": _bounce_phrases(side) for way, side in _SIDES.items()},
}


def describe(scene: Scene) -> str:
    """The canonical caption: colours, shapes, motions and relation, always in the same words.

    "a red circle moving left", "a red circle moving left above a blue square".
    """
    first, *others = scene.objects
    text = f"{_noun(first)} {_canonical_motion(first)}"
    for second in others:
        text += f" {RELATION_WORDS[scene.relation][0]} {_noun(second)}"
        if second.motion != "still":
            text += f" {_canonical_motion(second)}"
    return text


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """A caption in one of many phrasings, some with sizes, speeds and the background."""
    writer = _Writer(rng)
    text = writer.single(*scene.objects) if scene.relation is None else writer.pair(scene)
    if rng.random() < 0.6:
        text += " " + writer.choose(BACKGROUND_WORDS).format(scene.background)
    return text


def _canonical_motion(thing: SceneObject) -> str:
    verbs, complements = PHRASES[thing.motion][0]
    return verbs[0][0] + complements[0].format("")


def _noun(thing: SceneObject, size: str = "") -> str:
    words = " ".join(word for word in (size, thing.color, thing.shape) if word)
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


class _Writer:
    """The random choices of one caption."""

    def __init__(self, rng: np.random.Generator):
        self._rng = rng

    def choose(self, options: tuple) -> tuple | str:
        return options[self._rng.integers(len(options))]

    def single(self, thing: SceneObject) -> str:
        noun = self._noun(thing)
        form = self.choose(("participle", "present", "there is"))
        if form == "there is":
            return f"there is {noun} {self._motion(thing)}"
        return f"{noun} {self._motion(thing, present=form == 'present')}"

    def pair(self, scene: Scene) -> str:
        first, second = scene.objects
        relation = self.choose(RELATION_WORDS[scene.relation])
        nouns = self._noun(first), self._noun(second)
        silent = second.motion == "still" and self._rng.random() < 0.7
        # "moving to the left to the left of" would be hard to read.
        vertical = scene.relation in ("above", "below")
        form = self.choose(("inline", "inline", "clauses") if vertical else ("clauses",))
        if form == "inline":
            text = f"{nouns[0]} {self._motion(first)} {relation} {nouns[1]}"
            return text if silent else f"{text} {self._motion(second)}"
        text = f"{nouns[0]} {relation} {nouns[1]}"
        present = self._rng.random() < 0.5
        text += f", the {first.color} {first.shape} {self._motion(first, present)}"
        if not silent:
            text += f" and the {second.color} {second.shape} {self._motion(second, present)}"
        return text

    def _noun(self, thing: SceneObject) -> str:
        stated = thing.size is not None and self._rng.random() < 0.5
        return _noun(thing, self.choose(SIZE_WORDS[thing.size]) if stated else "")

    def _motion(self, thing: SceneObject, present: bool = False) -> str:
        verbs, complements = self.choose(tuple(PHRASES[thing.motion]))
        stated = thing.speed is not None and self._rng.random() < 0.4
        adverb = f" {self.choose(SPEED_WORDS[thing.speed])}" if stated else ""
        return self.choose(verbs)[present] + self.choose(complements).format(adverb)
