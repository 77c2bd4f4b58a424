"""Cutting videos into tiles: in time, as the VAE was trained, and in space, to save memory."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError
from ..numeric import whole_number


def time_tiles(length: int, tile: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of tiles of `tile` frames that overlap by one; the last may be shorter.

    Every frame is in some tile, and no tile holds the overlap alone (but for a single frame).
    """
    start = 0
    while start == 0 or start + 1 < length:
        yield start, min(start + tile, length)
        start += tile - 1


@dataclass(frozen=True)
class SpatialTiling:
    """Tile and overlap, (height, width) each, in latent pixels."""

    tile: tuple[int, int]
    overlap: tuple[int, int]

    @classmethod
    def from_pixels(
        cls,
        tile: int | tuple[int, int],
        overlap: int | tuple[int, int],
        factor: int,
    ) -> "SpatialTiling":
        """From sizes in pixels, which must be multiples of `factor`.

        Raises:
            InputError: other sizes, or an overlap that leaves no progress.
        """
        tile, overlap = _sides(tile, "tile"), _sides(overlap, "overlap")
        if any(size % factor for size in (*tile, *overlap)):
            raise InputError(
                f"tiles of {tile} pixels with an overlap of {overlap} do not fit the VAE: "
                f"use multiples of {factor}"
            )
        if any(not 0 <= o <= t // 2 or t == 0 for t, o in zip(tile, overlap, strict=True)):
            raise InputError(f"the overlap {overlap} must be 0 to half of the tile {tile}")
        return cls(
            (tile[0] // factor, tile[1] // factor), (overlap[0] // factor, overlap[1] // factor)
        )

    def covers(self, height: int, width: int) -> bool:
        """Whether a single tile holds a latent frame of this size."""
        return height <= self.tile[0] and width <= self.tile[1]


def _sides(size: int | tuple[int, int], name: str) -> tuple[int, int]:
    sides = tuple(size) if isinstance(size, Iterable) else (size, size)
    numbers = tuple(map(whole_number, sides))
    if len(sides) != 2 or None in numbers:
        raise InputError(f"the {name} must be one whole number or two, got {size!r}")
    return numbers


def blend_tiles(
    x: Tensor,
    run: Callable[[Tensor], Tensor],
    tiling: SpatialTiling,
    in_step: int,
    out_step: int,
) -> Tensor:
    """Run a network on overlapping tiles and blend the results linearly.

    Args:
        x: (B, C, T, H, W).
        run: from a tile (B, C, T, h, w) to (B, C', T', h * out_step / in_step, w * ...).
        in_step, out_step: values of the input and of the output along a side of a latent pixel.

    Returns:
        (B, C', T', H * out_step / in_step, W * ...). Blending is done in float32.
    """
    height, width = x.shape[3] // in_step, x.shape[4] // in_step
    out_size = (height * out_step, width * out_step)
    overlap = (tiling.overlap[0] * out_step, tiling.overlap[1] * out_step)
    total, weights = None, torch.zeros(out_size, dtype=torch.float32, device=x.device)
    for rows in _spans(height, tiling.tile[0], tiling.overlap[0]):
        for columns in _spans(width, tiling.tile[1], tiling.overlap[1]):
            result = run(x[..., _times(rows, in_step), _times(columns, in_step)])
            if total is None:
                total = result.new_zeros(*result.shape[:3], *out_size, dtype=torch.float32)
            down, across = _times(rows, out_step), _times(columns, out_step)
            weight = torch.outer(
                _weights(down, out_size[0], overlap[0], x.device),
                _weights(across, out_size[1], overlap[1], x.device),
            )
            total[..., down, across] += result * weight
            weights[down, across] += weight
    return (total / weights).to(x.dtype)


def _spans(length: int, tile: int, overlap: int) -> list[slice]:
    """Tiles of equal length that cover 0..length; the last is moved back to end there."""
    if length <= tile:
        return [slice(0, length)]
    starts = [*range(0, length - tile, tile - overlap), length - tile]
    return [slice(start, start + tile) for start in starts]


def _times(span: slice, step: int) -> slice:
    return slice(span.start * step, span.stop * step)


def _weights(span: slice, length: int, overlap: int, device: torch.device) -> Tensor:
    """Weights of a tile along one side: rising and falling lines where others overlap it."""
    options = {"dtype": torch.float32, "device": device}
    weights = torch.ones(span.stop - span.start, **options)
    rising = (torch.arange(overlap, **options) + 0.5) / max(overlap, 1)
    if overlap and span.start > 0:
        weights[:overlap] = rising
    if overlap and span.stop < length:
        weights[-overlap:] = rising.flip(0)
    return weights
