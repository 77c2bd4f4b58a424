"""A scene as answers to a fixed list of questions, for whatever learns to read captions."""

from .geometry import SHAPES
from .scene import Scene
from .vocabulary import BACKGROUNDS, COLORS, MOTIONS, RELATIONS, SIZES, SPEEDS

_AXES = ("horizontal", "vertical")
# Of each shape; None: there is no such shape, or nothing to say about it.
_OBJECT_QUESTIONS = {
    "color": (None, *COLORS),
    "shape": (None, *SHAPES),
    "motion": (None, *MOTIONS),
    "size": (None, *SIZES),
    "speed": (None, *SPEEDS),
}
# Question -> its possible answers. "first" is the shape further up or to the left, not the one
# that is named first: where things are is what a picture needs to know.
QUESTIONS: dict[str, tuple[str | None, ...]] = {
    "axis": (None, *_AXES),
    **{f"first {name}": answers for name, answers in _OBJECT_QUESTIONS.items()},
    **{f"second {name}": answers for name, answers in _OBJECT_QUESTIONS.items()},
    "background": tuple(BACKGROUNDS),
}


def scene_labels(scene: Scene) -> tuple[int, ...]:
    """The number of the right answer to each of `QUESTIONS`, in their order."""
    things, axis = list(scene.objects), None
    if scene.relation is not None:
        direction, named_first_is_first = RELATIONS[scene.relation]
        axis = _AXES[direction]
        if not named_first_is_first:
            things.reverse()
    answers = {"axis": axis, "background": scene.background}
    for position, thing in zip(("first", "second"), things, strict=False):
        for name in _OBJECT_QUESTIONS:
            answers[f"{position} {name}"] = getattr(thing, name)
    return tuple(options.index(answers.get(name)) for name, options in QUESTIONS.items())
