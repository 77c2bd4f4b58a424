"""A request, checked and encoded: what the sampler takes, for all samples or a part of them."""

from dataclasses import dataclass, field, replace
from threading import Event

import torch
from torch import Tensor

from .conditioning import Conditioning
from .noise import NoiseSource
from .request import Request
from .schedule import DiffusionSchedule


@dataclass(frozen=True)
class Run:
    """What the sampler takes.

    Attributes:
        num_frames: latent frames in all (T).
        given: (n, channels, K, h, w) latents to go on from, K < T, on the sampler's device and in
            its dtype, or None.
        batch_size: samples of the call (B).
        samples: those of this run, n of the B; all, or a part.
        stopped: set once somebody has stopped the call, whose parts share it.
    """

    request: Request
    num_frames: int
    set_sizes: list[int]
    schedule: DiffusionSchedule
    conditioning: Conditioning
    noise: NoiseSource
    given: Tensor | None
    batch_size: int
    samples: range
    stopped: Event = field(default_factory=Event)

    @property
    def output_type(self) -> str:
        return self.request.output_type

    @property
    def given_frames(self) -> list[Tensor]:
        """The given latents, frame by frame."""
        return [] if self.given is None else list(self.given.unbind(2))

    @property
    def part_name(self) -> str:
        """In front of a progress bar's name; empty for the whole batch."""
        if len(self.samples) == self.batch_size:
            return ""
        first, last = self.samples[0] + 1, self.samples[-1] + 1
        numbers = f"sample {first}" if first == last else f"samples {first}-{last}"
        return f"{numbers} of {self.batch_size}, "

    def part(self, start: int, stop: int, states: list[Tensor]) -> "Run":
        """The run of samples start .. stop - 1 alone, of a run of the whole batch.

        Args:
            states: of the noise, where its draws begin; see `NoiseSource.part`.
        """
        return replace(
            self,
            conditioning=self.conditioning.part(start, stop),
            noise=self.noise.part(start, stop, states),
            given=None if self.given is None else self.given[start:stop],
            samples=range(start, stop),
        )

    def join(self, parts: list[Tensor]) -> Tensor:
        """Latents of the whole batch.

        Args:
            parts: generated latents (n, channels, T', h, w) of parts, in order. After an interrupt
                some may be missing at the end, and the last may be short.

        Returns:
            (B, channels, K + the longest T', h, w), given frames first; zeros where nothing was
            generated.
        """
        longest = max(part.shape[2] for part in parts)
        shape = (self.batch_size, parts[0].shape[1], longest, *parts[0].shape[3:])
        generated, start = parts[0].new_zeros(shape), 0
        for part in parts:
            generated[start : start + len(part), :, : part.shape[2]] = part
            start += len(part)
        return generated if self.given is None else torch.cat([self.given, generated], dim=2)
