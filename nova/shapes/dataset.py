"""Clips by number: clip i of a seed is the same whatever was asked for before, and wherever."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..errors import InputError
from .captions import caption
from .rendering import render
from .sampling import sample_scene
from .scene import Scene
from .vocabulary import REFERENCE_FRAMES


class Clip(NamedTuple):
    """Frames (T, H, W, 3) uint8 at 12 frames a second, a caption of them, and what is in them."""

    frames: np.ndarray
    caption: str
    scene: Scene


@dataclass(frozen=True)
class ShapesDataset:
    """Captioned clips of the world of shapes, drawn when they are asked for.

    Clip i depends on `seed`, `held_out` and i alone, not on the order, the process or the share of
    the data that a process reads. Scenes and captions do not depend on frame size and length.

    Args:
        seed: at least 0; other seeds are other data.
        size: how many clips an epoch has; only `len` and iteration use it.
        num_frames, height, width: of every clip.
        held_out: False for training, True for the test split, None for both.
    """

    seed: int = 0
    size: int = 100_000
    num_frames: int = REFERENCE_FRAMES
    height: int = 64
    width: int = 64
    held_out: bool | None = False

    def __post_init__(self) -> None:
        if self.seed < 0 or self.size < 1:
            raise InputError(f"seed {self.seed} must be at least 0 and size {self.size} at least 1")

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Clip:
        """Clip `index`, from 0; raises IndexError beyond `size`, which ends a for loop."""
        if not 0 <= index < self.size:
            raise IndexError(f"clip {index} of {self.size}")
        return clip(
            self.seed,
            index,
            num_frames=self.num_frames,
            height=self.height,
            width=self.width,
            held_out=self.held_out,
        )


def clip(
    seed: int,
    index: int,
    *,
    num_frames: int = REFERENCE_FRAMES,
    height: int = 64,
    width: int = 64,
    held_out: bool | None = False,
) -> Clip:
    """Clip number `index` of the endless series that `seed` stands for; see `ShapesDataset`."""
    rng = np.random.default_rng((seed, index))
    scene = sample_scene(rng, held_out=held_out)
    text = caption(scene, rng)
    return Clip(render(scene, num_frames, height, width), text, scene)
