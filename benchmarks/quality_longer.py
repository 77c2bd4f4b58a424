"""The tasks of going on: from given frames, and beyond the trained length."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from clip_lengths import latent_frames, pixel_frames
from quality_cases import NEW_CAPTIONS, NEW_COMBINATIONS, Case
from quality_evaluation import Evaluation
from quality_results import Quantity, Section, TaskResult
from quality_scoring import (
    ENTRIES,
    WAYS,
    ScoredClip,
    accuracies,
    examples,
    mean_quantity,
    measurable_entries,
    score_clips,
    scored_section,
)
from quality_statistics import bootstrap, percentile_interval, wilson_interval

from nova import shapes
from nova.shapes.paths import paths

RATIO_WANTED = 0.8
REFERENCE_SIDE = 64  # distances are in pixels of frames whose shorter side is this


def continuation(evaluation: Evaluation) -> TaskResult:
    """Given the first half of a real clip, does the second go on as it should?

    Measured from the last given frame on, where the real clip shows what its caption says.
    """
    given = pixel_frames((latent_frames(evaluation.num_frames) + 1) // 2)
    cases = evaluation.cases(NEW_COMBINATIONS)
    clips = evaluation.sample(cases, "continuation", given_frames=given)
    rest = slice(given - 1, None)
    reconstructed = evaluation.reconstructed(NEW_COMBINATIONS)
    scored = [
        replace(clip, counted=measurable_entries(clip.case, [rest]))
        for clip in score_clips(cases, clips, reconstructed, part=rest)
    ]
    quantities = (*accuracies(scored), *_distances(scored, given))
    section = scored_section(f"frames {given - 1} to the end", scored, quantities)
    return TaskResult("continuation", (section,), examples(clips, scored))


def extrapolation(evaluation: Evaluation) -> TaskResult:
    """In clips of twice the trained length, is the second half as good as the first?

    Both halves are held against the caption, in the entries that are right on both halves of the
    real clip.
    """
    trained = evaluation.num_frames
    num_frames = 2 * trained - 1
    cases = evaluation.draw_cases(NEW_CAPTIONS, evaluation.case_set.clips, num_frames)
    options = {"num_frames": num_frames, "context_frames": evaluation.context_frames}
    clips = evaluation.sample(cases, "twice the length", **options)
    reconstructed = evaluation.reconstruct(cases)
    parts = (slice(0, trained), slice(trained, None))
    counted = [measurable_entries(case, parts) for case in cases]
    first, second = (
        [
            replace(clip, counted=entries)
            for clip, entries in zip(
                score_clips(cases, clips, reconstructed, part=part), counted, strict=True
            )
        ]
        for part in parts
    )
    sections = (
        scored_section(f"frames 0 to {trained - 1}", first, accuracies(first)),
        scored_section(f"frames {trained} to {num_frames - 1}", second, accuracies(second)),
        Section("second half / first half", _ratios(first, second)),
    )
    return TaskResult("extrapolation", sections, examples(clips, second))


def _distances(scored: Sequence[ScoredClip], given: int) -> tuple[Quantity, ...]:
    """How often all shapes are found in the last frame, and how far from where they should be.

    The floor of the distance is that of shapes which stay where the last given frame shows them.
    """
    count = len(scored)
    found, ceiling, floor = (_last_distances(scored, way, given) for way in WAYS)
    quantities = [
        Quantity(
            "all shapes found",
            len(found) / count,
            *wilson_interval(len(found), count),
            count,
            ceiling=len(ceiling) / count,
            floor=len(floor) / count,
        )
    ]
    if len(found):
        centers = [_centers(clip.case) for clip in scored]
        standing = [_mean_length(each[:, -1] - each[:, given - 1]) for each in centers]
        quantities.append(
            mean_quantity(
                "distance in the last frame",
                found,
                unit="pixels",
                ceiling=float(ceiling.mean()) if len(ceiling) else None,
                floor=float(np.mean(standing)),
            )
        )
    return tuple(quantities)


def _last_distances(scored: Sequence[ScoredClip], way: str, given: int) -> np.ndarray:
    """(n,) of the clips in which all shapes are seen in the last frame."""
    distances = (_last_distance(clip.case, getattr(clip, way), given) for clip in scored)
    return np.array([distance for distance in distances if distance is not None])


def _last_distance(case: Case, measured: shapes.Measurement, given: int) -> float | None:
    """Mean distance in pixels of the shapes, told by colour; None if one is not seen at the end.

    Args:
        measured: on the frames from the last given one on.
    """
    last = len(case.frames) - given
    offsets = []
    for thing, centers in zip(case.scene.objects, _centers(case), strict=True):
        seen = [x for x in measured.objects if x.color == thing.color and x.times[-1] == last]
        if not seen:
            return None
        offsets.append(seen[0].centers[-1] - centers[-1])
    return _mean_length(np.array(offsets))


def _centers(case: Case) -> np.ndarray:
    """(objects, T, 2) centres in the real clip, in fractions of the frame's shorter side."""
    num_frames, height, width = case.frames.shape[:3]
    return paths(case.scene, num_frames, height, width)[..., :2] / min(height, width)


def _mean_length(offsets: np.ndarray) -> float:
    """Of (n, 2) fractions of the shorter side, in pixels."""
    return REFERENCE_SIDE * float(np.linalg.norm(offsets, axis=-1).mean())


def _ratios(first: Sequence[ScoredClip], second: Sequence[ScoredClip]) -> tuple[Quantity, ...]:
    """Accuracy in the second half by that in the first, of all entries together and of each."""
    quantities = [_ratio("all", first, second, ENTRIES)]
    for name in ENTRIES:
        if any(name in clip.check("generated") for clip in first):
            quantities.append(_ratio(name, first, second, (name,)))
    return tuple(quantities)


def _ratio(
    name: str, first: Sequence[ScoredClip], second: Sequence[ScoredClip], entries: Sequence[str]
) -> Quantity:
    generated = _right(first, "generated", entries), _right(second, "generated", entries)
    ceiling = _right(first, "ceiling", entries), _right(second, "ceiling", entries)

    def ratio(of: tuple[np.ndarray, np.ndarray], chosen: np.ndarray | slice = slice(None)) -> float:
        before, after = (right[chosen].sum() for right in of)
        return float(after / before) if before else math.nan

    resampled = bootstrap(lambda chosen: ratio(generated, chosen), len(first))
    counted = [clip.check("generated").keys() & set(entries) for clip in first]
    return Quantity(
        name,
        ratio(generated),
        *percentile_interval(resampled),
        sum(map(bool, counted)),
        ceiling=ratio(ceiling),
        wanted=RATIO_WANTED,
    )


def _right(scored: Sequence[ScoredClip], way: str, entries: Sequence[str]) -> np.ndarray:
    """(clips,) how many of these entries are right."""
    checks = [clip.check(way) for clip in scored]
    return np.array([sum(check.get(name, False) for name in entries) for check in checks])
