"""The loop of `nova generate`: batches of samples through the pipeline, and into files."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from torch import Tensor

from ..checkpoint import save_state_dict
from ..media import compare_clips, write_image
from ..pipeline import NOVAPipeline
from .outputs import write_sample
from .samples import Sample

OVERVIEW_SAMPLES = 16  # on the sheet of a run


@dataclass
class Made:
    """What a run has made.

    Attributes:
        frames: their number.
        peak_memory: bytes on the GPU, see `NOVAPipelineOutput`.
    """

    frames: int = 0
    peak_memory: int | None = None

    def add(self, frames: int, peak_memory: int | None) -> None:
        """Count a batch."""
        self.frames += frames
        if peak_memory is not None:
            self.peak_memory = max(peak_memory, self.peak_memory or 0)


def make_samples(
    pipeline: NOVAPipeline,
    samples: list[Sample],
    options: dict[str, Any],
    *,
    batch_size: int,
    sheet: bool,
    overview_file: Path | None,
    latents_file: Path | None,
) -> Made:
    """Make and write samples; every file appears as soon as its batch is finished.

    Every sample has its own generator, so it does not depend on what else is in its batch.

    Args:
        options: arguments of the pipeline call.
        batch_size: samples at a time; where memory is too short for so many, batches get smaller.
        sheet: write contact sheets beside videos.
        overview_file: also write one contact sheet of the first samples here.
        latents_file: also write the latents of all samples here; where the run is broken off, of
            those that are finished.
    """
    made = Made()
    overview: list[np.ndarray] = []
    remaining = samples
    with _written_in_the_end(latents_file) as latents:
        while remaining:
            batch, remaining = remaining[:batch_size], remaining[batch_size:]
            conditions = [sample.condition for sample in batch]
            name = "prompt_embeds" if isinstance(conditions[0], Tensor) else "prompt"
            output = pipeline(
                **{name: conditions},
                **options,
                generator=[_generator(pipeline, sample.seed) for sample in batch],
                output_type="uint8",
            )
            # The next batches begin with what fitted into memory.
            batch_size = output.max_batch_size
            clips = output.images[:, None] if output.frames is None else output.frames
            made.add(sum(len(frames) for frames in clips), output.peak_memory)
            latents.append(output.latents.cpu())
            overview += list(clips)[: OVERVIEW_SAMPLES - len(overview)]
            for sample, frames in zip(batch, clips, strict=True):
                lines = write_sample(
                    sample.path, frames, options["fps"], caption=sample.caption, sheet=sheet
                )
                for line in lines:
                    typer.echo(line)
    if overview_file is not None:
        captions = [sample.caption or "" for sample in samples[: len(overview)]]
        write_image(overview_file, compare_clips(overview, captions=captions))
        typer.echo(f"{overview_file}: {len(overview)} samples")
    return made


@contextmanager
def _written_in_the_end(file: Path | None) -> Iterator[list[Tensor]]:
    """A list of latents, whose batches are written however the block ends."""
    latents: list[Tensor] = []
    try:
        yield latents
    finally:
        if file is not None and latents:
            written = save_state_dict({"latents": torch.cat(latents)}, file.parent, file.stem)
            typer.echo(f"{written}: latents")


def _generator(pipeline: NOVAPipeline, seed: int) -> torch.Generator:
    return torch.Generator(pipeline.device).manual_seed(seed)
