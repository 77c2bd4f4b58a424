"""The clips that `nova encode` and the training commands read, and what these print."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from ..data import ClipSource

SHAPES = "shapes"


def open_source(
    name: str,
    frames: int,
    height: int,
    width: int,
    fps: float,
    captions: Path | None,
    clips: int,
    seed: int,
    *,
    frames_only: bool = False,
) -> "ClipSource":
    """The clips of a folder, or `clips` drawn ones where `name` is that of the built-in world."""
    from ..data import ClipFormat, FolderSource, ShapesSource

    clip_format = ClipFormat(frames, height, width, fps)
    if name == SHAPES:
        return ShapesSource(clips, clip_format, seed, frames_only=frames_only)
    return FolderSource(name, clip_format, captions, frames_only=frames_only)


def echo(line: str) -> None:
    """Print on the first of several processes."""
    if os.environ.get("RANK", "0") == "0":
        typer.echo(line)
