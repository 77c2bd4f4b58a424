"""What a task reports: quantities in sections, which tables, plots and the JSON file all read."""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

SHARE = "share"  # unit of accuracies and ratios: 0 to 1, shown as percent


@dataclass(frozen=True)
class Quantity:
    """One measured number and what it can be held against.

    Attributes:
        value: NaN where it is undefined, as a correlation of equal numbers.
        low, high: its 95 % interval; None where there is none, as of times.
        count: how many clips, or shapes, it was measured on.
        unit: `SHARE`, "dB", "pixels", ... or "".
        ceiling: the same measured on real clips encoded and decoded by the VAE.
        floor: the same where the clip has nothing to do with what was asked for.
        wanted: the least that it should be.
    """

    name: str
    value: float
    low: float | None
    high: float | None
    count: int
    unit: str = SHARE
    ceiling: float | None = None
    floor: float | None = None
    wanted: float | None = None

    @property
    def reached(self) -> bool | None:
        return None if self.wanted is None else self.value >= self.wanted

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which knows no NaN: undefined numbers are None."""
        numbers = ("value", "low", "high", "ceiling", "floor", "wanted")
        return {
            **{name: _for_json(getattr(self, name)) for name in numbers},
            "count": self.count,
            "unit": self.unit,
            "reached": self.reached,
        }


@dataclass(frozen=True)
class ClipNote:
    """What was wrong with one clip.

    Attributes:
        index: of the case in its split.
        wrong: entries of `nova.shapes.check`.
        seen: what the clip shows instead.
    """

    index: int
    caption: str
    wrong: tuple[str, ...]
    seen: str

    def __str__(self) -> str:
        verdict = f"wrong: {', '.join(self.wrong)} (seen: {self.seen})" if self.wrong else "right"
        return f"{self.caption} | {verdict}"


@dataclass(frozen=True)
class Section:
    """Quantities that belong together.

    Attributes:
        wrong_clips: those of its clips that were wrong in something.
        pairs: (asked for, measured) motion score of every clip.
        is_part: of another section; it has no plot of its own.
    """

    name: str
    quantities: tuple[Quantity, ...]
    wrong_clips: tuple[ClipNote, ...] = ()
    pairs: tuple[tuple[float, float], ...] = ()
    is_part: bool = False

    @property
    def by_name(self) -> dict[str, Quantity]:
        return {quantity.name: quantity for quantity in self.quantities}

    def to_dict(self) -> dict[str, Any]:
        result: dict[str, Any] = {q.name: q.to_dict() for q in self.quantities}
        if self.wrong_clips:
            result["wrong_clips"] = [vars(note) for note in self.wrong_clips]
        if self.pairs:
            result["asked_and_measured"] = [[round(x, 3) for x in pair] for pair in self.pairs]
        return result


@dataclass(frozen=True)
class Example:
    """A generated clip, uint8 (T, H, W, 3), and what is written above it on a contact sheet."""

    text: str
    frames: np.ndarray


@dataclass(frozen=True)
class TaskResult:
    """All that a task reports."""

    task: str
    sections: tuple[Section, ...]
    examples: tuple[Example, ...] = field(default=(), repr=False)

    def to_dict(self) -> dict[str, Any]:
        return {section.name: section.to_dict() for section in self.sections}


def _for_json(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, 5)
