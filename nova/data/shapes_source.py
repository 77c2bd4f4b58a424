"""The world of shapes (`nova.shapes`) as a source of clips."""

from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError
from ..numeric import whole_number
from .clips import Clip, ClipFormat, measure_motion

if TYPE_CHECKING:
    from ..shapes import Clip as ShapesClip

_SMALLEST_SIDE = 16  # pixels that a shape can be drawn on


class ShapesSource:
    """Clips that are drawn when they are asked for; their ground truth is known.

    Args:
        size: number of clips.
        clip_format: of the clips; the world of shapes has a frame rate of its own.
        seed: other seeds are other clips.
        held_out: False for training, True for the test split, None for both.
        frames_only: for those who need no motion scores.

    Raises:
        InputError: no clips, another frame rate, or an argument of another type.
    """

    def __init__(
        self,
        size: int,
        clip_format: ClipFormat,
        seed: int = 0,
        held_out: bool | None = False,
        frames_only: bool = False,
    ):
        from ..shapes import FPS

        # As Python's, which the index of encoded clips can hold.
        self._size, self._seed = whole_number(size), whole_number(seed)
        if self._size is None or self._size < 1 or self._seed is None or self._seed < 0:
            raise InputError(
                f"size {size!r} must be at least 1, and seed {seed!r} at least 0: whole numbers"
            )
        if held_out is not None and not isinstance(held_out, (bool, np.bool_)):
            raise InputError(f"held_out must be True, False or None, got {held_out!r}")
        self._held_out = None if held_out is None else bool(held_out)
        if clip_format.fps != FPS:
            raise InputError(f"shapes move at {FPS:g} frames a second, not {clip_format.fps:g}")
        self.format = clip_format
        self._frames_only = frames_only

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Clip:
        wanted = self.format
        frames, caption, _ = self._draw(index, wanted.num_frames, wanted.height, wanted.width)
        flow = 0.0 if self._frames_only else measure_motion(frames, wanted.fps)
        return Clip(f"shapes-{self._seed}-{index}", frames, caption, None, flow, wanted.fps)

    def caption(self, index: int) -> str:
        """Caption of clip `index`."""
        return self._smallest(index).caption

    def labels(self, index: int) -> tuple[int, ...]:
        """What clip `index` shows, as `nova.shapes.labels.scene_labels` numbers it."""
        from ..shapes.labels import scene_labels

        return scene_labels(self._smallest(index).scene)

    def _smallest(self, index: int) -> "ShapesClip":
        # Captions and scenes do not depend on the size, so the smallest picture will do.
        return self._draw(index, 1, _SMALLEST_SIDE, _SMALLEST_SIDE)

    def _draw(self, index: int, num_frames: int, height: int, width: int) -> "ShapesClip":
        from ..shapes import clip

        if not 0 <= index < self._size:
            raise IndexError(f"clip {index} of {self._size}")
        return clip(
            self._seed,
            index,
            num_frames=num_frames,
            height=height,
            width=width,
            held_out=self._held_out,
        )

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "shapes",
            "size": self._size,
            "seed": self._seed,
            "held_out": self._held_out,
            "format": self.format.to_dict(),
        }
