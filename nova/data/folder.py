"""A folder of videos or images with captions, as a source of clips."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint import expand_home
from ..errors import InputError
from ..media import fit, read_image, read_video
from ..model import NUM_CLASSES
from .clips import Clip, ClipFormat, measure_motion

READABLE_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
READABLE_VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".gif")
CAPTIONS_FILE = "captions.jsonl"


@dataclass(frozen=True)
class _Entry:
    path: Path
    key: str
    caption: str | None
    label: int | None


class FolderSource:
    """Videos or images of a folder and the folders in it, one clip a file.

    Captions stand in a text file beside each file (x.mp4, x.txt), or in one JSONL file with an
    object a line: {"file": "x.mp4", "caption": "..."} or {"file": "x.png", "label": 7}, paths
    relative to it. A clip is the first `num_frames` frames at the wanted rate, scaled to cover the
    size and cut at the centre.

    Args:
        folder: searched in the order of names, each folder that links lead to once; with a JSONL
            file, its order counts.
        clip_format: of the clips. Images are read where it has one frame.
        captions: the JSONL file; None: captions.jsonl of the folder, or text files without it.
        frames_only: for those who need no captions (which may be missing) and no motion scores.

    Raises:
        InputError: no folder, nothing in it, or a line of the JSONL file that is not as above.
            What is wrong with single files is said when they are read.
        CheckpointError: ~ of a user that there is not.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        clip_format: ClipFormat,
        captions: str | os.PathLike | None = None,
        frames_only: bool = False,
    ):
        self.folder = expand_home(folder)
        self.format = clip_format
        self._frames_only = frames_only
        # Unlike Path.is_dir(), this takes any name.
        if not os.path.isdir(self.folder):
            raise InputError(f"{self.folder} is not a folder; give one with videos or images")
        if captions is None and os.path.isfile(self.folder / CAPTIONS_FILE):
            captions = self.folder / CAPTIONS_FILE
        if captions is not None:
            self._entries = _read_captions(expand_home(captions))
        else:
            self._entries = _find_files(self.folder)
        if not self._entries:
            suffixes = ", ".join((*READABLE_VIDEO_SUFFIXES, *READABLE_IMAGE_SUFFIXES))
            raise InputError(f"{captions or self.folder} names no file with one of {suffixes}")

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Clip:
        entry = self._entries[index]
        caption = None if self._frames_only else self.caption(index)
        frames, fps = self._read(entry.path)
        frames, _ = fit(frames, self.format.height, self.format.width)
        flow = 0.0 if self._frames_only else measure_motion(frames, fps)
        return Clip(entry.key, frames, caption, entry.label, flow, fps)

    def caption(self, index: int) -> str | None:
        """Caption of clip `index`, without reading its frames; None for class labels."""
        entry = self._entries[index]
        if entry.caption is None and entry.label is None:
            return _sidecar_caption(entry.path)
        if entry.caption is not None:
            try:
                entry.caption.encode("utf-8")
            except UnicodeEncodeError as error:  # JSON may hold half of a surrogate pair
                raise InputError(f"{entry.path} has a caption that is no text: {error}") from None
        return entry.caption

    def describe(self) -> dict[str, Any]:
        listing = json.dumps([(e.key, e.caption, e.label) for e in self._entries])
        contents = json.dumps([_contents(entry) for entry in self._entries])
        return {
            "kind": "folder",
            "folder": str(self.folder.resolve()),
            "files": len(self),
            "listing": hashlib.sha256(listing.encode()).hexdigest(),
            # Beside the listing: it is not in the index of folders that were encoded before.
            "contents": hashlib.sha256(contents.encode()).hexdigest(),
            "format": self.format.to_dict(),
        }

    def _read(self, path: Path) -> tuple[np.ndarray, float]:
        wanted = self.format
        if path.suffix.lower() in READABLE_IMAGE_SUFFIXES:
            if wanted.num_frames > 1:
                raise InputError(f"{path} is an image; clips of {wanted.num_frames} are wanted")
            return read_image(path)[None], wanted.fps
        frames, fps = read_video(path, fps=wanted.fps, max_frames=wanted.num_frames)
        if len(frames) < wanted.num_frames:
            raise InputError(
                f"{path} has {len(frames)} frames at {wanted.fps:g} a second; "
                f"{wanted.num_frames} are needed"
            )
        return frames, fps


def _find_files(folder: Path) -> list[_Entry]:
    suffixes = (*READABLE_VIDEO_SUFFIXES, *READABLE_IMAGE_SUFFIXES)
    paths: list[Path] = []
    starts, seen = [folder], set()
    # Grows by the links to folders. They come after the folders themselves, so that links to these,
    # or around in a circle, change nothing.
    for start in starts:
        links = []
        for parent, folders, files in os.walk(start):
            real = os.path.realpath(parent)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            paths += (Path(parent, name) for name in (*folders, *files))
            links += (Path(parent, name) for name in folders if os.path.islink(f"{parent}/{name}"))
        starts += sorted(links)
    paths = sorted(path for path in paths if path.suffix.lower() in suffixes)
    return [_Entry(path, str(path.relative_to(folder)), None, None) for path in paths]


def _contents(entry: _Entry) -> tuple[int | None, int | None, str | None]:
    """What changes with a file: its size, its time in ns, and the text beside it.

    None for what cannot be read, of which an error tells when the clip is.
    """
    size = time = caption = None
    try:
        status = entry.path.stat()
        size, time = status.st_size, status.st_mtime_ns
        if entry.caption is None and entry.label is None:
            caption = _sidecar_caption(entry.path)
    except (OSError, ValueError):  # ValueError: no caption, or a name that no file can have
        pass
    return size, time, caption


def _sidecar_caption(path: Path) -> str:
    sidecar = path.with_suffix(".txt")
    try:
        caption = " ".join(sidecar.read_text(encoding="utf-8-sig").split())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} has no caption: {sidecar.name} cannot be read: {error}") from None
    if not caption:
        raise InputError(f"{path} has no caption: {sidecar.name} is empty")
    return caption


def _read_captions(path: Path) -> list[_Entry]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or a name that no file can have
        raise InputError(f"{path} cannot be read as UTF-8 text: {error}") from None
    # JSON may hold what splitlines() takes for an end of line, such as U+2028.
    return [
        _parse_line(line, path, number)
        for number, line in enumerate(text.split("\n"), start=1)
        if line.strip()
    ]


def _parse_line(line: str, path: Path, number: int) -> _Entry:
    try:
        entry = json.loads(line)
        file, caption, label = entry["file"], entry.get("caption"), entry.get("label")
        known = set(entry) <= {"file", "caption", "label"}
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
        known, file, caption, label = False, None, None, None
    has_caption = isinstance(caption, str) and caption.strip() != ""
    is_class = isinstance(label, int) and not isinstance(label, bool) and 0 <= label < NUM_CLASSES
    right = known and isinstance(file, str) and (has_caption or caption is None)
    if not (right and (is_class or (label is None and has_caption))):
        raise InputError(
            f"{path}, line {number}: expected an object with `file` and `caption` (a sentence), "
            f"or `file` and `label` (0 to {NUM_CLASSES - 1}), got {line[:80]}"
        )
    return _Entry(path.parent / file, file, caption, label)
