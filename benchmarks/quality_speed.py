"""Quality against speed: the same captions and noise with several numbers of steps."""

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from measure import timed
from quality_cases import SPLITS, Case
from quality_evaluation import Evaluation, batches, progress
from quality_results import Quantity, Section, TaskResult
from quality_sampler import ClipSampler, SamplerSettings
from quality_scoring import accuracies, score_clips

from nova.errors import InputError

SECONDS, FPS, SPEED_UP = "seconds a clip", "frames a second", "times the slowest"


@dataclass(frozen=True)
class Sweep:
    """Which presets are compared, and on how many clips, half of them from each split.

    Attributes:
        steps, diffusion_steps: values of A and of D; all pairs are measured.

    Raises:
        InputError: no or impossible steps, or no clip of each split.
    """

    steps: tuple[int, ...]
    diffusion_steps: tuple[int, ...]
    clips: int

    def __post_init__(self) -> None:
        for name in ("steps", "diffusion_steps"):
            values = getattr(self, name)
            if not values or min(values) < 1:
                option = f"--sweep-{name.replace('_', '-')}"
                raise InputError(f"{option} needs numbers of at least 1, such as 4,8,16")
        if self.clips < len(SPLITS):
            raise InputError(f"--sweep-clips must be at least {len(SPLITS)}, got {self.clips}")


def measure_sweep(evaluation: Evaluation, sweep: Sweep) -> TaskResult:
    """Accuracy of text to video, and its time, for every pair (A, D).

    The time is that of a pipeline call (text encoder, transformer, VAE) by clip: the median over
    the batches, after one batch that does not count.
    """
    cases = [
        case
        for split in SPLITS
        for case in evaluation.draw_cases(split, sweep.clips // len(SPLITS), evaluation.num_frames)
    ]
    reconstructed = evaluation.reconstruct(cases)
    seconds, sections = [], []
    for steps, diffusion_steps in itertools.product(sweep.steps, sweep.diffusion_steps):
        settings = replace(
            evaluation.settings, num_inference_steps=steps, num_diffusion_steps=diffusion_steps
        )
        name = f"A={steps} D={diffusion_steps}"
        clips, time = _timed_clips(evaluation.sampler, cases, settings, name)
        seconds.append(time)
        sections.append(Section(name, accuracies(score_clips(cases, clips, reconstructed))))
    slowest = max(seconds)
    timed_sections = []
    for section, time in zip(sections, seconds, strict=True):
        speeds = {SECONDS: time, FPS: evaluation.num_frames / time, SPEED_UP: slowest / time}
        quantities = (
            Quantity(name, value, None, None, len(cases), unit="") for name, value in speeds.items()
        )
        timed_sections.append(replace(section, quantities=(*section.quantities, *quantities)))
    return TaskResult("sweep", tuple(timed_sections))


def _timed_clips(
    sampler: ClipSampler, cases: Sequence[Case], settings: SamplerSettings, label: str
) -> tuple[list[np.ndarray], float]:
    """Generated clips, and the median seconds a clip."""
    clips: list[np.ndarray] = []
    seconds = []
    parts = list(batches(cases, sampler.batch_size))
    for number, batch in enumerate(progress([parts[0], *parts], f"{label}, batches")):
        made, time = timed(
            lambda b=batch: sampler.sample(b, settings, num_frames=sampler.num_frames),
            sampler.device,
        )
        if number > 0:  # the first one warms up
            clips += list(made)
            seconds.append(time / len(batch))
    return clips, statistics.median(seconds)
