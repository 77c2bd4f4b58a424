"""Accuracies: clips measured by `nova.shapes.measure` and held against their scenes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from quality_cases import Case
from quality_results import ClipNote, Example, Quantity, Section
from quality_statistics import bootstrap, percentile_interval, wilson_interval

from nova import shapes

ENTRIES = ("count", "background", "color", "shape", "motion", "direction", "relation")
ENTRIES_OF_A_SHAPE = ("color", "shape", "motion")
NUM_EXAMPLES = 8  # clips of a task on its contact sheet
WAYS = ("generated", "ceiling", "floor")


@dataclass(frozen=True)
class ScoredClip:
    """A case and three measurements to hold against its scene.

    Attributes:
        scene: of the case, or a part of it.
        generated: measured on the generated clip.
        ceiling: on the real clip that went through the VAE.
        floor: on the clip that was generated for another case.
        counted: entries of `shapes.check` that count for this clip.
    """

    case: Case
    scene: shapes.Scene
    generated: shapes.Measurement
    ceiling: shapes.Measurement
    floor: shapes.Measurement
    counted: tuple[str, ...] = ENTRIES

    def check(self, way: str) -> dict[str, bool]:
        """The counted entries of `shapes.check`; `way` is one of `WAYS`."""
        entries = shapes.check(self.scene, getattr(self, way))
        counted = [name for name in self.counted if _is_asked_for(name, self.case)]
        return {name: right for name, right in entries.items() if name in counted}

    def note(self) -> ClipNote:
        wrong = tuple(name for name, right in self.check("generated").items() if not right)
        things = [f"{x.color} {x.shape} {x.motion}" for x in self.generated.objects]
        return ClipNote(self.case.index, self.case.caption, wrong, ", ".join(things) or "nothing")


def _is_asked_for(entry: str, case: Case) -> bool:
    """Of the entries, the background alone may be left out of a caption: any is right then."""
    return entry != "background" or case.scene.background in case.caption


def score_clips(
    cases: Sequence[Case],
    clips: Sequence[np.ndarray],
    reconstructed: Sequence[np.ndarray],
    *,
    part: slice = slice(None),
) -> list[ScoredClip]:
    """Measure generated clips, and the real ones behind the VAE.

    Args:
        clips, reconstructed: uint8 (T, H, W, 3), one a case.
        part: the frames that are measured.
    """
    generated = [shapes.measure(clip[part]) for clip in clips]
    ceiling = [shapes.measure(clip[part]) for clip in reconstructed]
    floor = generated[-1:] + generated[:-1]
    return [
        ScoredClip(case, case.scene, *measured)
        for case, *measured in zip(cases, generated, ceiling, floor, strict=True)
    ]


def measurable_entries(case: Case, parts: Sequence[slice]) -> tuple[str, ...]:
    """The entries that are right on each of these parts of the case's real clip.

    Parts of a clip may not show all that its scene says: what moved may have come to rest at the
    border, and half a bounce is a straight line.
    """
    checks = [shapes.check(case.scene, shapes.measure(case.frames[part])) for part in parts]
    return tuple(name for name in checks[0] if all(check[name] for check in checks))


def each_shape(scored: Sequence[ScoredClip]) -> list[ScoredClip]:
    """Every shape of every scene by itself, held against the measured one that fits it best."""
    return [
        replace(
            clip,
            scene=shapes.Scene((thing,), clip.scene.background),
            counted=ENTRIES_OF_A_SHAPE,
        )
        for clip in scored
        for thing in clip.scene.objects
    ]


def accuracies(
    scored: Sequence[ScoredClip], wanted: Mapping[str, float] | None = None
) -> tuple[Quantity, ...]:
    """The share of clips right in each entry, in the order of `ENTRIES`; none without clips.

    Args:
        wanted: entry -> the least that it should be.
    """
    checks = {way: [clip.check(way) for clip in scored] for way in WAYS}
    quantities = []
    for name in ENTRIES:
        right = {way: [c[name] for c in checks[way] if name in c] for way in WAYS}
        count = len(right["generated"])
        if count:
            total = sum(right["generated"])
            low, high = wilson_interval(total, count)
            quantities.append(
                Quantity(
                    name,
                    total / count,
                    low,
                    high,
                    count,
                    ceiling=sum(right["ceiling"]) / count,
                    floor=sum(right["floor"]) / count,
                    wanted=(wanted or {}).get(name),
                )
            )
    return tuple(quantities)


def mean_quantity(name: str, values: np.ndarray, **fields: object) -> Quantity:
    """The mean over clips (n,), n at least 1, with a bootstrap interval."""
    means = bootstrap(lambda chosen: values[chosen].mean(), len(values))
    return Quantity(name, float(values.mean()), *percentile_interval(means), len(values), **fields)


def scored_section(
    name: str, scored: Sequence[ScoredClip], quantities: tuple[Quantity, ...]
) -> Section:
    """A section with notes on the clips that are wrong in something."""
    notes = [clip.note() for clip in scored]
    return Section(name, quantities, tuple(note for note in notes if note.wrong))


def examples(clips: Sequence[np.ndarray], scored: Sequence[ScoredClip]) -> tuple[Example, ...]:
    """The first clips, with what is right and wrong in them."""
    first = list(zip(scored, clips, strict=True))[:NUM_EXAMPLES]
    return tuple(Example(str(clip.note()), frames) for clip, frames in first)
