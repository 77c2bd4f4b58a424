"""Decoding latents while they are still being generated."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import InputError


class StreamingDecoder:
    """Decode latents as they come; the pieces, put together, equal decoding them at once.

    GroupNorm sees a whole tile, so its frames are there when its last latent is. Tiles of two
    latents give every new latent's frames at once, after the first two.

    Args:
        decode_tile: latents (B, C, n, h, w) of a tile to pixels (B, 3, T, H, W).
        tile_latents: latents of a tile.
        overlap: latents that a tile shares with the one before. As many frames are dropped at its
            beginning: at most one, which stands for one frame.
        first_frame_alone: the first latent is a tile of its own, so that its frame is there at
            once, in front of the others, of which the first then drops as many.
        in_channels: C.
        no_pixels: latents to pixels of no frame (B, 3, 0, H, W), for empty results.
    """

    def __init__(
        self,
        decode_tile: Callable[[Tensor], Tensor],
        tile_latents: int,
        overlap: int = 1,
        *,
        first_frame_alone: bool = False,
        in_channels: int,
        no_pixels: Callable[[Tensor], Tensor],
    ):
        self._decode_tile = decode_tile
        self._tile_latents = tile_latents
        self._overlap = overlap
        self._first_frame_alone = first_frame_alone
        self._in_channels = in_channels
        self._no_pixels = no_pixels
        self._pending: Tensor | None = None
        self._started = False
        self._finished = False

    def push(self, latents: Tensor) -> Tensor:
        """Add latents (B, C, n, h, w), any n.

        Returns:
            The frames finished by them, (B, 3, T, H, W), T = 0 if there are none yet.

        Raises:
            InputError: another shape than before, or a stream that is finished.

        After an error while decoding, such as too little memory, the stream is as it was before
        the call, which may be repeated.
        """
        if self._finished:
            raise InputError("this stream is finished; start a new one")
        if latents.dim() != 5 or latents.shape[1] != self._in_channels:
            raise InputError(
                f"latents have shape {tuple(latents.shape)}; expected (batch, "
                f"{self._in_channels}, frames, height, width)"
            )
        before = self._pending, self._started
        if self._pending is None:
            # A copy: what waits for the next call must not change with the caller's tensor.
            self._pending = latents.clone()
        elif latents[:, :, :0].shape != self._pending[:, :, :0].shape:
            raise InputError(
                f"latents have shape {tuple(latents.shape)} after {tuple(self._pending.shape)}; "
                "only the number of frames may change"
            )
        else:
            self._pending = torch.cat([self._pending, latents.to(self._pending)], dim=2)
        finished = []
        try:
            while self._pending.shape[2] >= self._next_length:
                finished.append(self._next_tile())
            return self._join(finished)
        except BaseException:
            self._pending, self._started = before
            raise

    def finish(self) -> Tensor:
        """Decode what is left in a last, shorter tile.

        Returns:
            (B, 3, T, H, W), T = 0 if nothing is left.

        Raises:
            InputError: nothing was pushed, or called twice.
        """
        if self._finished or self._pending is None:
            raise InputError("this stream is finished" if self._finished else "nothing was pushed")
        decoded = self._overlap if self._started else 0
        rest = [self._next_tile()] if self._pending.shape[2] > decoded else []
        self._finished = True
        return self._join(rest)

    @property
    def _next_length(self) -> int:
        """Latents of the next tile, if there are so many."""
        return 1 if self._first_frame_alone and not self._started else self._tile_latents

    def _next_tile(self) -> Tensor:
        length = self._next_length
        pixels = self._decode_tile(self._pending[:, :, :length])
        if self._started:
            pixels = pixels[:, :, self._overlap :]
        self._started = True
        self._pending = self._pending[:, :, length - self._overlap :]
        return pixels

    def _join(self, pieces: list[Tensor]) -> Tensor:
        if not pieces:
            return self._no_pixels(self._pending)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)
