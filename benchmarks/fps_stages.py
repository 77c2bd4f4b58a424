"""Where the exact sampler's time goes: stages that add up to the whole.

Measured in a run of its own, because the clock waits for the GPU wherever a stage begins or ends.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from measure import synchronize
from random_model import RandomModelRun
from shared_weights import share_weights
from torch import Tensor
from work_counts import DENOISE, IMAGE_ENCODER, REST, VIDEO_ENCODER

from nova.conditioning import Conditioning
from nova.denoising import SetNoise
from nova.model import NOVATransformer
from nova.sampling import generate_frames
from nova.set_step import FrameTensors, SetNumbers, SetSteps
from nova.video_context import VideoContext

STAGES = (VIDEO_ENCODER, IMAGE_ENCODER, DENOISE, REST)


class StageClock:
    """Sums up what passes in each stage; an inner stage does not count for the outer one.

    Args:
        now: a count that grows, such as seconds.

    Attributes:
        totals: by stage.
    """

    def __init__(self, now: Callable[[], float]):
        self.totals = dict.fromkeys(STAGES, 0.0)
        self._now = now
        self._open: list[str] = []
        self._counted_to = 0.0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """What happens inside counts for this stage."""
        self._count()
        self._open.append(name)
        try:
            yield
        finally:
            self._count()
            self._open.pop()

    def _count(self) -> None:
        now = self._now()
        if self._open:
            self.totals[self._open[-1]] += now - self._counted_to
        self._counted_to = now


class TimedTransformer(NOVATransformer):
    """A transformer whose methods tell a clock when they run."""

    clock: StageClock

    def _video(self) -> AbstractContextManager[None]:
        return self.clock.stage(VIDEO_ENCODER)

    def video_positions(self, num_frames: int) -> Tensor | None:
        with self._video():
            return super().video_positions(num_frames)

    def video_rotary(self, num_frames: int) -> Tensor | None:
        with self._video():
            return super().video_rotary(num_frames)

    def embed_first_frame(self, batch_size: int, positions: Tensor | None) -> Tensor:
        with self._video():
            return super().embed_first_frame(batch_size, positions)

    def embed_frames(self, latents: Tensor, positions: Tensor | None) -> Tensor:
        with self._video():
            return super().embed_frames(latents, positions)

    def encode_video(self, tokens: Tensor, **options: Any) -> Tensor:
        with self._video():
            return super().encode_video(tokens, **options)

    def mix(self, first: Tensor, current: Tensor) -> Tensor:
        with self._video():
            return super().mix(first, current)

    def encode_image(
        self, cond: Tensor, revealed: Tensor, masked: Tensor, **options: Any
    ) -> Tensor:
        with self.clock.stage(IMAGE_ENCODER):
            return super().encode_image(cond, revealed, masked, **options)


class TimedSteps(SetSteps):
    """Steps of the set loop; what is not the image encoder in them is the denoise loop."""

    def __init__(self, steps: SetSteps, clock: StageClock):
        super().__init__(steps.model, steps.head, steps.schedule, steps.guidance, steps.blocks)
        self._clock = clock

    def run(self, frame: FrameTensors, drawn: SetNoise, numbers: SetNumbers) -> Tensor:
        with self._clock.stage(DENOISE):
            return super().run(frame, drawn, numbers)


class TimedSampler:
    """The exact sampler under a clock, called like `nova.sampling.generate_frames`."""

    def __init__(self, clock: StageClock):
        self._clock = clock

    def steps(self, steps: SetSteps, set_sizes: Sequence[int]) -> SetSteps:
        """The steps of a run, where the sampler would take them from CUDA graphs."""
        return TimedSteps(steps, self._clock)

    def video_context(self, *run: Any) -> VideoContext:
        """The frame loop's state, where the sampler would take it from CUDA graphs."""
        return VideoContext(*run)

    def __call__(
        self, model: NOVATransformer, conditioning: Conditioning, **options: Any
    ) -> Iterator[Tensor]:
        timed = share_weights(model, TimedTransformer)
        timed.clock = self._clock
        with self._clock.stage(REST):
            yield from generate_frames(timed, conditioning, graphs=self, **options)


def measure_stages(run: RandomModelRun, now: Callable[[], float]) -> dict[str, float]:
    """What passes by the count `now` in each stage of a run; together it is all that passes."""
    clock = StageClock(now)
    run.sample(TimedSampler(clock))
    return clock.totals


def stage_seconds(run: RandomModelRun, device: torch.device) -> dict[str, float]:
    """Seconds of each stage, by a clock that waits for the GPU."""

    def now() -> float:
        synchronize(device)
        return time.perf_counter()

    return measure_stages(run, now)
