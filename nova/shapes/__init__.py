"""A world of captioned clips in which all is known: shapes that move on a plain background.

`ShapesDataset` and `clip` give frames, captions and scenes; `measure` and `check` say by OpenCV
whether a clip, a generated one as well, shows what a scene says. See docs/shapes.md.
"""

from .captions import caption, describe
from .checking import check
from .dataset import Clip, ShapesDataset, clip
from .measuring import Measurement, ObjectMeasurement, measure
from .rendering import render
from .sampling import sample_scene
from .scene import Scene, SceneObject, facts, is_held_out
from .vocabulary import FPS

__all__ = [
    "FPS",
    "Clip",
    "Measurement",
    "ObjectMeasurement",
    "Scene",
    "SceneObject",
    "ShapesDataset",
    "caption",
    "check",
    "clip",
    "describe",
    "facts",
    "is_held_out",
    "measure",
    "render",
    "sample_scene",
]
