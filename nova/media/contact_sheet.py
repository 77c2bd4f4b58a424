"""Contact sheets: a clip, or several, on one picture that a glance can judge."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import InputError, dependency_error
from ..numeric import checked_count
from .pixels import check_clip

if TYPE_CHECKING:
    from PIL.Image import Image

CELL_WIDTH = 240  # pixels that a frame is scaled to; small frames grow by a whole factor
FONT_SIZE = 14
MARGIN = 8
BACKGROUND = (24, 24, 27)
CAPTION_COLOR = (244, 244, 245)
LABEL_COLOR = (161, 161, 170)
MAX_CAPTION_LINES = 3


def contact_sheet_path(output: str | os.PathLike) -> Path:
    """Return where the sheet of a video goes: clips/x.mp4 -> clips/x_sheet.png."""
    output = Path(output)
    return output.with_name(f"{output.stem}_sheet.png")


def contact_sheet(
    frames: np.ndarray,
    *,
    columns: int | None = None,
    caption: str | None = None,
    max_frames: int = 12,
) -> np.ndarray:
    """Lay evenly chosen frames of a clip, the first and the last included, on a grid.

    Args:
        frames: uint8, (T, H, W, 3).
        columns: frames in a row; None chooses 4, or fewer for a short clip.
        caption: text above the grid, such as the prompt; long ones are wrapped, then cut.
        max_frames: at most so many frames are shown; each bears its number, counted from 0.

    Returns:
        uint8 array (H, W, 3).

    Raises:
        InputError: no frames, wrong shape or dtype, or columns or max_frames below one.
    """
    check_clip(frames)
    max_frames = checked_count("max_frames", max_frames, least=1)
    shown = _evenly_chosen(len(frames), max_frames)
    columns = min(len(shown), 4) if columns is None else columns
    columns = checked_count("columns", columns, least=1)
    drawer = _Drawer()
    cells = [drawer.cell(frames[index], f"frame {index}") for index in shown]
    rows = [cells[k : k + columns] for k in range(0, len(cells), columns)]
    return drawer.sheet([(caption, rows)])


def compare_clips(
    clips: Sequence[np.ndarray],
    *,
    columns: int = 6,
    captions: Sequence[str] | None = None,
) -> np.ndarray:
    """Lay several clips below each other, one row of evenly chosen frames each.

    Args:
        clips: list of uint8 arrays (T, H, W, 3); lengths and sizes may differ.
        columns: at most so many frames of each clip.
        captions: one text a clip, drawn above its row, or None.

    Returns:
        uint8 array (H, W, 3).

    Raises:
        InputError: no clips, a clip of the wrong shape or dtype, or captions of another count.
    """
    if len(clips) == 0:
        raise InputError("a contact sheet needs at least one clip.")
    if captions is not None and len(captions) != len(clips):
        raise InputError(f"{len(clips)} clips were given with {len(captions)} captions.")
    columns = checked_count("columns", columns, least=1)
    drawer = _Drawer()
    sections = []
    for index, clip in enumerate(clips):
        check_clip(clip)
        row = [drawer.cell(clip[k], f"frame {k}") for k in _evenly_chosen(len(clip), columns)]
        sections.append((captions[index] if captions is not None else None, [row]))
    return drawer.sheet(sections)


def _evenly_chosen(count: int, at_most: int) -> list[int]:
    if at_most == 1:
        return [0]
    return np.linspace(0, count - 1, min(count, at_most)).round().astype(int).tolist()


class _Drawer:
    """Pillow's modules and its built-in font, behind the few drawing steps of a sheet."""

    def __init__(self) -> None:
        try:
            from PIL import Image, ImageDraw, ImageFont
        except ImportError as error:
            need = "contact sheets need pillow"
            raise dependency_error(need, "PIL", "pip install pillow", error) from error
        self._image, self._draw = Image, ImageDraw
        self._font = ImageFont.load_default(FONT_SIZE)
        ascent, descent = self._font.getmetrics()
        self._line_height = ascent + descent + 2

    def cell(self, frame: np.ndarray, label: str) -> "Image":
        """One frame at display size with its label below."""
        height, width = frame.shape[:2]
        image = self._image.fromarray(np.ascontiguousarray(frame))
        if width <= CELL_WIDTH // 2:
            # Whole pixels stay visible: blur would hide what a small model really produced.
            factor = CELL_WIDTH // width
            size = (width * factor, height * factor)
            image = image.resize(size, self._image.Resampling.NEAREST)
        else:
            size = (CELL_WIDTH, max(1, round(height * CELL_WIDTH / width)))
            image = image.resize(size, self._image.Resampling.LANCZOS)
        # The label needs some room under very narrow frames.
        label_width = round(self._font.getlength(label)) + 2
        cell_size = (max(size[0], label_width), size[1] + self._line_height)
        cell = self._image.new("RGB", cell_size, BACKGROUND)
        cell.paste(image, (0, 0))
        self._text(cell, (0, size[1] + 1), label, LABEL_COLOR)
        return cell

    def sheet(self, sections: list[tuple[str | None, list[list["Image"]]]]) -> np.ndarray:
        """Stack sections of (caption or None, rows of cells) on one canvas."""
        width = max(
            sum(cell.width for cell in row) + MARGIN * (len(row) + 1)
            for _, rows in sections
            for row in rows
        )
        placed = []
        captions = []
        top = MARGIN
        for caption, rows in sections:
            for line in self._wrap(caption or "", width - 2 * MARGIN):
                captions.append((top, line))
                top += self._line_height
            for row in rows:
                left = MARGIN
                for cell in row:
                    placed.append((left, top, cell))
                    left += cell.width + MARGIN
                top += max(cell.height for cell in row) + MARGIN // 2
            top += MARGIN // 2
        canvas = self._image.new("RGB", (width, top), BACKGROUND)
        for left, y, cell in placed:
            canvas.paste(cell, (left, y))
        for y, line in captions:
            self._text(canvas, (MARGIN, y), line, CAPTION_COLOR)
        return np.array(canvas)

    def _text(
        self, image: "Image", position: tuple[int, int], text: str, color: tuple[int, int, int]
    ) -> None:
        self._draw.Draw(image).text(position, text, fill=color, font=self._font)

    def _wrap(self, text: str, width: int) -> list[str]:
        """Break text into lines of at most `width` pixels, and cut it after the last allowed."""
        lines = []
        line = ""
        for word in text.split():
            # A word wider than the sheet (or a language without spaces) breaks anywhere.
            pieces = [word] if self._font.getlength(word) <= width else list(word)
            for number, piece in enumerate(pieces):
                space = " " if line and number == 0 else ""
                if line and self._font.getlength(line + space + piece) > width:
                    lines.append(line)
                    line = piece
                else:
                    line += space + piece
        lines.append(line)
        if len(lines) > MAX_CAPTION_LINES:
            lines = lines[:MAX_CAPTION_LINES]
            while lines[-1] and self._font.getlength(lines[-1] + "...") > width:
                lines[-1] = lines[-1][:-1]
            lines[-1] += "..."
        return [line for line in lines if line]
