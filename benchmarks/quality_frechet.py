"""The distance between generated and real clips as a whole, with what it should be held against."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from frechet import FeatureSpace, clip_features, frechet_distance
from quality_cases import SPLITS
from quality_evaluation import Evaluation, progress
from quality_results import Quantity, Section, TaskResult
from quality_statistics import bootstrap, percentile_interval

from nova import shapes

# Seeds, counted from that of the cases, of other real clips.
BASIS_SEED, REFERENCE_SEED = 1, 2
NUM_BASIS_CLIPS = 512
CEILING, FLOOR = "real through the VAE", "first frame repeated"


def frechet(evaluation: Evaluation) -> TaskResult:
    """How far generated clips are from real clips of other captions, as many of them.

    For comparison the same of the cases' real clips, as they are, through the VAE, and made wrong:
    what looks right but stands still, what shows nothing, what moves at random. (Played backwards
    they would not be far: what moves left is as frequent as what moves right.)
    """
    basis = _real_features(evaluation, BASIS_SEED, NUM_BASIS_CLIPS, held_out=False)
    space = FeatureSpace.fit(basis)
    reference = space.project(
        np.concatenate(
            [
                _real_features(evaluation, REFERENCE_SEED, evaluation.case_set.clips, held_out)
                for held_out in SPLITS.values()
            ]
        )
    )
    quantities = {
        name: _distance(name, space.project(_features(clips, name)), reference)
        for name, clips in _sets(evaluation).items()
    }
    quantities["generated"] = replace(
        quantities["generated"],
        ceiling=quantities[CEILING].value,
        floor=quantities[FLOOR].value,
    )
    return TaskResult(
        "frechet",
        (Section(f"to {len(reference)} other real clips", tuple(quantities.values())),),
    )


def _sets(evaluation: Evaluation) -> dict[str, Sequence[np.ndarray]]:
    real = [case.frames for case in evaluation.both_splits(evaluation.cases)]
    rng = np.random.default_rng(evaluation.case_set.seed)
    return {
        "generated": evaluation.both_splits(evaluation.generated),
        "real": real,
        CEILING: evaluation.both_splits(evaluation.reconstructed),
        FLOOR: [np.repeat(clip[:1], len(clip), axis=0) for clip in real],
        # No shape reaches the corner.
        "background alone": [np.broadcast_to(clip[:, :1, :1], clip.shape) for clip in real],
        "frames in random order": [rng.permutation(clip) for clip in real],
    }


def _real_features(evaluation: Evaluation, seed: int, count: int, held_out: bool) -> np.ndarray:
    """(count, 96) of real clips that are in no case."""
    height, width = evaluation.sampler.size
    dataset = shapes.ShapesDataset(
        evaluation.case_set.seed + seed, count, evaluation.num_frames, height, width, held_out
    )
    return _features([clip.frames for clip in dataset], "other real clips")


def _features(clips: Sequence[np.ndarray], label: str) -> np.ndarray:
    """(n, 96)."""
    return np.stack([clip_features(clip) for clip in progress(clips, f"features: {label}")])


def _distance(name: str, features: np.ndarray, reference: np.ndarray) -> Quantity:
    value = frechet_distance(features, reference)
    resampled = bootstrap(lambda i: frechet_distance(features[i], reference[i]), len(features))
    # Resampled sets hold fewer different clips, which alone puts them further apart.
    low, high = percentile_interval(resampled - resampled.mean() + value)
    return Quantity(name, value, max(low, 0.0), high, len(features), unit="")
