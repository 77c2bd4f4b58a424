"""One autoregressive step: the image encoder, then the denoise loop of a set of tokens.

The step is a function of tensors alone, its noise included, so that it can be recorded (engine.py).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from .denoising import SetNoise, denoise
from .guidance import Guidance
from .head import PreparedHead
from .layers import Block, Rotary
from .model import NOVATransformer
from .schedule import DiffusionSchedule
from .token_order import TokenOrder


@dataclass(frozen=True)
class FrameTensors:
    """What the steps of a frame read. Tokens are in the order in which they are revealed.

    Attributes:
        cond: (passes * B, C, E) the frame's condition.
        embedded: (passes * B, N, E) embedded tokens; those that are not revealed hold anything.
        masked: (passes * B, N, E) mask tokens with positions.
        rotary: table of [condition, tokens]; None with absolute positions.
    """

    cond: Tensor
    embedded: Tensor
    masked: Tensor
    rotary: Rotary | None

    @classmethod
    def of(cls, cond: Tensor, order: TokenOrder) -> "FrameTensors":
        """Of a frame of which nothing is revealed."""
        return cls(cond, torch.empty_like(order.masked), order.masked, order.rotary)


@dataclass(frozen=True)
class SetNumbers:
    """Which tokens a step makes, start .. stop - 1 in their order, and its guidance scale."""

    start: int
    stop: int
    scale: float


class SetSteps:
    """The steps of a run, computed as they are called.

    Args:
        head: of the model, prepared for `schedule`.
        blocks: of the image encoder, arranged for the run; None: the model's own.
    """

    def __init__(
        self,
        model: NOVATransformer,
        head: PreparedHead,
        schedule: DiffusionSchedule,
        guidance: Guidance,
        blocks: Sequence[Block] | None = None,
    ):
        self.model, self.head, self.blocks = model, head, blocks
        self.schedule, self.guidance = schedule, guidance

    @contextmanager
    def frame(self, cond: Tensor, order: TokenOrder) -> Iterator[FrameTensors]:
        """The tensors of a new frame; the caller writes what is revealed into `embedded`.

        Inside, `run` makes the frame's sets.
        """
        yield FrameTensors.of(cond, order)

    def run(self, frame: FrameTensors, drawn: SetNoise, numbers: SetNumbers) -> Tensor:
        """(B, stop - start, token_dim) clean tokens; they are valid until the next step."""
        start, stop = numbers.start, numbers.stop
        z = self.model.encode_image(
            frame.cond,
            frame.embedded[:, :start],
            frame.masked[:, start:],
            rotary=frame.rotary,
            rows=slice(start, stop),
            blocks=self.blocks,
        )
        return denoise(
            self.head,
            z,
            drawn,
            schedule=self.schedule,
            guidance=self.guidance,
            scale=numbers.scale,
        )
