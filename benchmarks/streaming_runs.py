"""Runs of streaming.py: when the pixels of one clip arrive, and that they are right."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from measure import PeakBytes, is_lost, synchronize

import nova
from nova_kernels.errors import in_a_line

# Pixels may differ by rounding: of so many of 256 levels.
ALLOWED_LEVELS = 2


@dataclass(frozen=True)
class Tiles:
    """How the VAE cuts time.

    Attributes:
        latents: latent frames that it decodes together.
        first_frame_alone: the first one by itself, before.
    """

    latents: int
    first_frame_alone: bool = False


@dataclass(frozen=True)
class Way:
    """A way to get the pixels of a clip.

    Attributes:
        name: for tables.
        streams: piece by piece; else by a call, all at once.
        tiles: see `Tiles`.
        overlaps: the VAE decodes while the next frame is sampled; needs a GPU.
    """

    name: str
    streams: bool
    tiles: Tiles
    overlaps: bool = False


def ways(device: torch.device, tile_latents: int) -> list[Way]:
    """All ways of a device; `tile_latents` is what the VAE was trained for.

    Of each kind of tiles the call, which others are compared with, comes first.
    """
    found = []
    trained = Tiles(tile_latents)
    for tiles in dict.fromkeys((trained, Tiles(tile_latents, True), Tiles(2, True))):
        suffix = "" if tiles.latents == tile_latents else f", tiles of {tiles.latents}"
        suffix += ", first alone" if tiles.first_frame_alone else ""
        found += [Way(f"call{suffix}", False, tiles), Way(f"stream{suffix}", True, tiles)]
        if device.type == "cuda":
            found.append(Way(f"stream{suffix}, overlapped", True, tiles, overlaps=True))
    return found


@dataclass(frozen=True)
class Arrivals:
    """When the pixel frames of one run were there.

    Attributes:
        pieces: (seconds since the start, number of frames), one after the other.
    """

    pieces: tuple[tuple[float, int], ...]

    @property
    def first_s(self) -> float:
        return self.pieces[0][0]

    @property
    def last_s(self) -> float:
        return self.pieces[-1][0]

    @property
    def num_frames(self) -> int:
        return sum(frames for _, frames in self.pieces)

    def plays_from(self, rate: float) -> float:
        """The earliest second to start playing at, so many frames a second, without a pause."""
        shown, earliest = 0, 0.0
        for seconds, frames in self.pieces:
            earliest = max(earliest, seconds - shown / rate)
            shown += frames
        return earliest


@dataclass
class WayRuns:
    """What was seen of a way: timed runs, or why there are none.

    Attributes:
        levels: of 256, by which a value differs on average from that of the first way's tiles;
            None: nothing to compare with.
    """

    way: Way
    runs: list[Arrivals]
    peak_bytes: int = 0
    levels: float | None = None
    refused: str | None = None

    @property
    def median(self) -> Arrivals:
        """The run of the median time; the faster one of the middle two."""
        return sorted(self.runs, key=lambda run: run.last_s)[(len(self.runs) - 1) // 2]


def run_ways(
    pipe: nova.NOVAPipeline,
    chosen: Sequence[Way],
    request: dict[str, Any],
    *,
    repeats: int,
    say: Callable[[str], None] = lambda line: None,
    keep: Callable[[list[WayRuns]], None] = lambda seen: None,
) -> list[WayRuns]:
    """Every way once to warm up, then in turns, until the GPU is lost; all runs are checked.

    Args:
        request: of the call, without generator.
        say: is told what was run.
        keep: is given those that were timed or refused so far, as soon as there is more of them.

    Returns:
        Those that were timed or refused: all, unless the GPU was lost.
    """
    seen, right = [WayRuns(way, []) for way in chosen], {}
    for turn in range(repeats + 1):
        for one in seen:
            if one.refused is not None:
                continue
            verdict = _take_turn(
                pipe, one, request, right, first_tiles=chosen[0].tiles, is_timed=turn > 0
            )
            say(f"{'first run' if turn == 0 else f'turn {turn}'}, {one.way.name}: {verdict}")
            if turn > 0 or one.refused is not None:
                keep(_known(seen))
            if one.refused is not None and is_lost(pipe.device):  # others are not to blame
                say(f"the GPU refuses all work after {one.way.name}")
                return _known(seen)
    return _known(seen)


def _known(seen: list[WayRuns]) -> list[WayRuns]:
    return [one for one in seen if one.runs or one.refused is not None]


def _take_turn(
    pipe: nova.NOVAPipeline,
    one: WayRuns,
    request: dict[str, Any],
    right: dict[Tiles, np.ndarray],
    *,
    first_tiles: Tiles,
    is_timed: bool,
) -> str:
    """Run a way, check its frames, and add its time; why it is refused, or how long it took.

    Args:
        right: the frames to compare with by kind of tiles; those of a call's first run are added.
        first_tiles: of the first way.
        is_timed: whether the time counts.
    """
    peak = PeakBytes(pipe.device)
    try:
        arrivals, frames = _run(pipe, one.way, request)
    except Exception as error:  # whatever compilers, drivers and other packages raise
        one.refused = f"failed: {in_a_line(error)}"
        return one.refused
    one.peak_bytes = max(one.peak_bytes, peak.read())
    if not one.way.streams:
        right.setdefault(one.way.tiles, frames)
    one.refused = _difference(frames, right.get(one.way.tiles))
    if is_timed:
        if one.refused is None:
            one.runs.append(arrivals)
    else:
        by_first = right.get(first_tiles)
        if by_first is not None and by_first.shape == frames.shape:
            one.levels = float(np.abs(frames.astype(int) - by_first.astype(int)).mean())
    return one.refused or f"{arrivals.last_s:.3g} s"


def _run(pipe: nova.NOVAPipeline, way: Way, request: dict[str, Any]) -> tuple[Arrivals, np.ndarray]:
    """When frames arrived, and the frames (T, H, W, 3) uint8."""
    request = {**request, "generator": torch.Generator(pipe.device).manual_seed(0)}
    pipe.vae.module.tile_latents = way.tiles.latents
    pipe.vae.module.first_frame_alone = way.tiles.first_frame_alone
    pieces, frames = [], []
    synchronize(pipe.device)
    start = time.perf_counter()
    for piece in _pieces(pipe, way, request):  # on the CPU: the GPU has done its work
        if len(piece):
            pieces.append((time.perf_counter() - start, len(piece)))
            frames.append(piece)
    return Arrivals(tuple(pieces)), np.concatenate(frames)


def _pieces(pipe: nova.NOVAPipeline, way: Way, request: dict[str, Any]) -> Iterator[np.ndarray]:
    if not way.streams:
        yield pipe(**request, output_type="uint8").frames[0]
        return
    stream = pipe.stream(**request, output_type="uint8", overlap_decoding=way.overlaps)
    yield from (piece.frames[0] for piece in stream)


def _difference(frames: np.ndarray, expected: np.ndarray | None) -> str | None:
    """What is wrong with frames, which the call's tell, if it gave any; None: nothing."""
    if expected is None:
        return "failed: the call gave no frames to compare with"
    if frames.shape != expected.shape:
        return f"wrong: frames of shape {frames.shape}, the call's {expected.shape}"
    levels = int(np.abs(frames.astype(int) - expected.astype(int)).max())
    if levels > ALLOWED_LEVELS:
        return f"wrong: differs from the call by {levels} of 256 levels, allowed {ALLOWED_LEVELS}"
    return None
