"""The tasks on clips of the trained length: from text, with a motion score, from an image."""

from collections.abc import Sequence

import numpy as np
from quality_cases import (
    NEW_COMBINATIONS,
    SPLITS,
    Case,
    nearest_possible_score,
    score_without_flicker,
)
from quality_evaluation import Evaluation, progress
from quality_results import Example, Quantity, Section, TaskResult
from quality_scoring import (
    NUM_EXAMPLES,
    accuracies,
    each_shape,
    examples,
    mean_quantity,
    score_clips,
    scored_section,
)
from quality_statistics import bootstrap, percentile_interval, rank_correlation

from nova import shapes
from nova.motion import motion_score

TEXT_WANTED = {"color": 0.95, "shape": 0.90, "direction": 0.90}
IMAGE_WANTED = {"direction": 0.85}
CORRELATION_WANTED = 0.8
MOST_PSNR = 100.0  # decibels, of equal frames
EXAMPLES_OF_A_SPLIT = 4


def text_to_video(evaluation: Evaluation) -> TaskResult:
    """Does a clip show what its caption says?"""
    sections, shown = [], []
    for split in SPLITS:
        cases, clips = evaluation.cases(split), evaluation.generated(split)
        scored = score_clips(cases, clips, evaluation.reconstructed(split))
        single = [clip for clip in scored if len(clip.scene.objects) == 1]
        pairs = [clip for clip in scored if len(clip.scene.objects) == 2]
        sections += [
            scored_section(split, scored, accuracies(scored, TEXT_WANTED)),
            Section(f"{split}, one shape", accuracies(single), is_part=True),
            Section(f"{split}, two shapes", accuracies(pairs), is_part=True),
            Section(f"{split}, each shape", accuracies(each_shape(scored)), is_part=True),
        ]
        shown += examples(clips, scored)[:EXAMPLES_OF_A_SPLIT]
    return TaskResult("text-to-video", tuple(sections), tuple(shown))


def motion(evaluation: Evaluation) -> TaskResult:
    """Does a clip move as much as was asked for? As the caption lets expect, and beyond it."""
    cases = evaluation.both_splits(evaluation.cases)
    as_in_the_data = _correlation_section(
        "as in the data",
        cases,
        _scores(evaluation.both_splits(evaluation.generated)),
        _scores(evaluation.both_splits(evaluation.reconstructed)),
    )
    swept_cases = evaluation.swept_cases()
    clips = evaluation.sample(swept_cases, "text to video, swept motion")
    measured = _scores(clips)
    possible = [nearest_possible_score(c) for c in progress(swept_cases, "possible scores")]
    swept = _correlation_section("swept", swept_cases, measured, possible)
    clean = [
        score_without_flicker(case, clip)
        for case, clip in zip(swept_cases, progress(clips, "without flicker"), strict=True)
    ]
    steady = _correlation_section(
        "swept, without flicker", swept_cases, clean, possible, wanted=None
    )
    shown = tuple(
        Example(f"{case.caption} | asked for {case.motion:.1f}, measured {score:.1f}", clip)
        for case, score, clip in zip(swept_cases, measured, clips, strict=True)
    )
    return TaskResult("motion", (as_in_the_data, swept, steady), shown[:NUM_EXAMPLES])


def image_to_video(evaluation: Evaluation) -> TaskResult:
    """Is the given first frame kept, and does the clip go on as the caption says?"""
    cases = evaluation.cases(NEW_COMBINATIONS)
    reconstructed = evaluation.reconstructed(NEW_COMBINATIONS)
    clips = evaluation.sample(cases, "image to video", given_frames=1)
    scored = score_clips(cases, clips, reconstructed)
    given = [case.frames[0] for case in cases]
    quantities = (
        *accuracies(scored, IMAGE_WANTED),
        mean_quantity(
            "first frame PSNR",
            _psnr(clips, given),
            unit="dB",
            ceiling=_psnr(reconstructed, given).mean(),
            floor=_psnr(clips, given[1:] + given[:1]).mean(),
        ),
    )
    section = scored_section(NEW_COMBINATIONS, scored, quantities)
    return TaskResult("image-to-video", (section,), examples(clips, scored))


def _scores(clips: Sequence[np.ndarray]) -> list[float]:
    return [motion_score(clip, shapes.FPS) for clip in progress(clips, "motion scores")]


def _correlation_section(
    name: str,
    cases: Sequence[Case],
    measured: Sequence[float],
    best: Sequence[float],
    *,
    wanted: float | None = CORRELATION_WANTED,
) -> Section:
    """The rank correlation of what the cases ask for with what was measured.

    Args:
        best: scores of the real clips that are the ceiling.
    """
    asked, measured = np.array([case.motion for case in cases]), np.array(measured)
    resampled = bootstrap(lambda i: rank_correlation(asked[i], measured[i]), len(cases))
    quantity = Quantity(
        "rank correlation",
        rank_correlation(asked, measured),
        *percentile_interval(resampled),
        len(cases),
        unit="",
        ceiling=rank_correlation(asked, best),
        floor=rank_correlation(asked, np.roll(measured, 1)),
        wanted=wanted,
    )
    pairs = tuple(zip(asked.tolist(), measured.tolist(), strict=True))
    return Section(name, (quantity,), pairs=pairs)


def _psnr(clips: Sequence[np.ndarray], frames: Sequence[np.ndarray]) -> np.ndarray:
    """(n,) peak signal-to-noise ratio in decibels of each clip's first frame."""
    pairs = zip(clips, frames, strict=True)
    errors = [np.square(clip[0] / 255 - frame / 255).mean() for clip, frame in pairs]
    return -10 * np.log10(np.maximum(errors, 10 ** (-MOST_PSNR / 10)))
