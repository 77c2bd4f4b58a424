"""What all tasks share: the sampler, the test cases, and clips that more than one task looks at."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from quality_cases import SPLITS, TRAINING_SEED, Case, draw_case, draw_swept_case
from quality_sampler import ClipSampler, SamplerSettings
from tqdm import tqdm

from nova.errors import InputError

FEWEST_CLIPS = 2  # one clip has no other to be confused with
DEFAULT_SEED = 20_250_713
# About what nine in ten real clips like the swept ones score.
DEFAULT_MOTION_RANGE = (1.0, 3.5)

T = TypeVar("T")


@dataclass(frozen=True)
class CaseSet:
    """Which cases are asked for.

    Attributes:
        clips: of every task, and of each split where a task has both.
        seed: of the cases and of the model's noise; not that of training.
        motion_range: scores that the swept cases ask for.

    Raises:
        InputError: too few clips, the seed of training, or an empty range.
    """

    clips: int
    seed: int = DEFAULT_SEED
    motion_range: tuple[float, float] = DEFAULT_MOTION_RANGE

    def __post_init__(self) -> None:
        if self.clips < FEWEST_CLIPS:
            raise InputError(f"--clips must be at least {FEWEST_CLIPS}, got {self.clips}")
        if self.seed <= TRAINING_SEED:
            raise InputError(
                f"--seed must be above {TRAINING_SEED}, the seed of the clips of training, got "
                f"{self.seed}"
            )
        low, high = self.motion_range
        if not (0 <= low < high and math.isfinite(high)):
            raise InputError(f"--motion-range needs two scores 0 <= LOW < HIGH, got {low} {high}")


class Evaluation:
    """Cases, generated clips and reconstructed clips, each made once.

    Args:
        sampler: a `ClipSampler`, or what has its methods and attributes.
        context_frames: latent frames seen at a time beyond the trained length; None: all.

    Attributes:
        num_frames: pixel frames of a clip of the trained length.
    """

    def __init__(
        self,
        sampler: ClipSampler,
        settings: SamplerSettings,
        case_set: CaseSet,
        context_frames: int | None = None,
    ):
        self.sampler = sampler
        self.settings = settings
        self.case_set = case_set
        self.context_frames = context_frames
        self.num_frames = sampler.num_frames
        self._made: dict[tuple[str, str], list[Any]] = {}

    def cases(self, split: str) -> list[Case]:
        """Cases of a split, with clips of the trained length."""
        count = self.case_set.clips
        return self._once("cases", split, lambda: self.draw_cases(split, count, self.num_frames))

    def draw_cases(self, split: str, count: int, num_frames: int) -> list[Case]:
        """The first `count` cases of a split, with real clips of `num_frames` pixel frames."""
        indices = progress(range(count), f"drawing {split}")
        seed, size = self.case_set.seed, self.sampler.size
        return [draw_case(split, seed, i, num_frames, size, self.num_frames) for i in indices]

    def swept_cases(self) -> list[Case]:
        """Cases whose motion score does not follow from their caption."""
        indices = progress(range(self.case_set.clips), "drawing scenes that move")
        case_set, size = self.case_set, self.sampler.size
        return [
            draw_swept_case(case_set.seed, i, self.num_frames, size, case_set.motion_range)
            for i in indices
        ]

    def generated(self, split: str) -> list[np.ndarray]:
        """Clips from the captions of a split."""
        label = f"text to video, {split}"
        return self._once("generated", split, lambda: self.sample(self.cases(split), label))

    def reconstructed(self, split: str) -> list[np.ndarray]:
        """The real clips of a split, encoded and decoded by the VAE."""
        return self._once("reconstructed", split, lambda: self.reconstruct(self.cases(split)))

    def both_splits(self, of: Callable[[str], list[T]]) -> list[T]:
        """`cases`, `generated` or `reconstructed` of one split after the other."""
        return [item for split in SPLITS for item in of(split)]

    def sample(
        self, cases: Sequence[Case], label: str, *, num_frames: int | None = None, **options: Any
    ) -> list[np.ndarray]:
        """Generated clips, uint8 (T, H, W, 3).

        Args:
            label: of the progress bar.
            num_frames: pixel frames; None: the trained length.
            options: of `ClipSampler.sample`.
        """
        options["num_frames"] = self.num_frames if num_frames is None else num_frames
        return self._in_batches(
            cases, label, lambda batch: self.sampler.sample(batch, self.settings, **options)
        )

    def reconstruct(self, cases: Sequence[Case]) -> list[np.ndarray]:
        """The real clips of cases through the VAE."""
        return self._in_batches(
            cases,
            "real clips through the VAE",
            lambda batch: self.sampler.reconstruct([case.frames for case in batch]),
        )

    def _in_batches(
        self, cases: Sequence[Case], label: str, make: Callable[[Sequence[Case]], np.ndarray]
    ) -> list[np.ndarray]:
        clips: list[np.ndarray] = []
        with tqdm(total=len(cases), **_bar(label)) as bar:
            for batch in batches(cases, self.sampler.batch_size):
                clips += list(make(batch))
                bar.update(len(batch))
        return clips

    def _once(self, kind: str, split: str, make: Callable[[], list[T]]) -> list[T]:
        if (kind, split) not in self._made:
            self._made[kind, split] = make()
        return self._made[kind, split]


def batches(cases: Sequence[Case], size: int) -> Iterator[Sequence[Case]]:
    return (cases[start : start + size] for start in range(0, len(cases), size))


def progress(items: Iterable[T], label: str) -> Iterable[T]:
    """The items, behind a progress bar on a terminal."""
    return tqdm(items, **_bar(label))


def _bar(label: str) -> dict[str, Any]:
    return {"desc": label, "unit": "clip", "leave": False, "disable": None}
