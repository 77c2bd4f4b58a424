"""Captioned clips, and what a source of them looks like."""

from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from ..errors import InputError
from ..numeric import check_finite, check_whole

VIDEO_STRIDE = 4  # pixel frames of a latent frame, but for the first, of the released VAE
# Optical flow costs more than all else that is done to a small clip; motion changes slowly.
MOTION_PAIRS = 6


@dataclass(frozen=True)
class ClipFormat:
    """What every clip of a source looks like.

    Attributes:
        num_frames: pixel frames, 1 + 4n; 1 for images.
        height, width: pixels.
        fps: frames a second.

    Raises:
        InputError: a number that no clip can have.
    """

    num_frames: int
    height: int
    width: int
    fps: float = 12.0

    def __post_init__(self) -> None:
        check_whole(self, "num_frames", "height", "width", least=1)
        check_finite(self, "fps")
        if (self.num_frames - 1) % VIDEO_STRIDE:
            raise InputError(
                f"num_frames must be 1 + a multiple of {VIDEO_STRIDE}, got {self.num_frames}"
            )
        if self.fps <= 0:
            raise InputError(f"fps must be above 0, got {self.fps:g}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Clip:
    """One training clip or image.

    Attributes:
        key: names it in reports, such as its file.
        frames: uint8 (T, H, W, 3), T = 1 for an image.
        caption: what it shows; None in data of class labels.
        label: its class, 0..999; None in captioned data.
        motion_flow: motion score (`nova.motion`); 0 for images.
        fps: frames a second.
    """

    key: str
    frames: np.ndarray
    caption: str | None
    label: int | None
    motion_flow: float
    fps: float


class ClipSource(Protocol):
    """A numbered collection of clips; the same number always gives the same clip."""

    format: ClipFormat

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Clip:
        """Clip `index`.

        Raises:
            NovaError: this one cannot be read; the message says why.
        """
        ...

    def caption(self, index: int) -> str | None:
        """Caption of clip `index`, without reading its frames; None for class labels."""
        ...

    def describe(self) -> dict[str, Any]:
        """What the clips depend on, for JSON: two sources that differ must differ here."""
        ...


def measure_motion(frames: np.ndarray, fps: float) -> float:
    """Motion score of frames (T, H, W, 3); an image has none."""
    if len(frames) == 1:
        return 0.0
    # OpenCV is needed by those who make data only.
    from ..motion import motion_score

    return motion_score(frames, fps, max_pairs=MOTION_PAIRS)
