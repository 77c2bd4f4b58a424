"""Pixels of latent frames while further ones are generated."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .outputs import StreamedFrames
from .side_stream import SideStream
from .vae import StreamingDecoder

Decode = Callable[["Piece"], Any]
Convert = Callable[[Any], Any]


@dataclass(frozen=True)
class Piece:
    """A generated latent frame, on its way to pixels.

    Attributes:
        index: of the latent frame.
        latents: (n, channels, h, w) of this frame.
        fresh: (n, channels, k, h, w) all frames that the decoder has not seen: this one and, in the
            first piece, given ones.
        is_last: no frame follows.
        samples: which of the call's samples these are.
    """

    index: int
    latents: Tensor
    fresh: Tensor
    is_last: bool
    samples: range

    def with_frames(self, frames: Any) -> StreamedFrames:
        return StreamedFrames(self.index, self.latents, frames, self.samples)


def pixels_of(decoder: StreamingDecoder, piece: Piece) -> Tensor:
    """The pixel frames (n, 3, T, H, W) that a piece makes final, T = 0 if there are none yet."""
    with torch.no_grad():
        pixels = decoder.push(piece.fresh)
        return torch.cat([pixels, decoder.finish()], dim=2) if piece.is_last else pixels


def decode_in_turn(
    pieces: Iterable[Piece], decode: Decode, convert: Convert
) -> Iterator[StreamedFrames]:
    """Decode every frame before the next is generated.

    Args:
        decode: pixels of a piece.
        convert: pixels to the output type.
    """
    for piece in pieces:
        yield piece.with_frames(convert(decode(piece)))


def decode_beside(
    pieces: Iterable[Piece], decode: Decode, convert: Convert, side: SideStream
) -> Iterator[StreamedFrames]:
    """Decode every frame while the next is generated: the same items, one frame later.

    Args:
        decode, convert: see `decode_in_turn`; they run on `side`.
    """
    waiting: tuple[Piece, Any] | None = None
    for piece in pieces:
        # The next frame is under way: now there is time to wait for the one before, and only then
        # is this one launched, since `finish` stands behind all that was launched.
        finished = None if waiting is None else _finish(waiting, convert, side)
        waiting = piece, side.launch(partial(decode, piece), reads=piece.fresh)
        if finished is not None:
            yield finished
    if waiting is not None:
        yield _finish(waiting, convert, side)


def _finish(waiting: tuple[Piece, Any], convert: Convert, side: SideStream) -> StreamedFrames:
    piece, launched = waiting
    return piece.with_frames(side.finish(convert, launched))
