"""The loop of `nova generate`: batches of samples through the pipeline, and into files."""

from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor

from ..checkpoint import save_state_dict
from ..pipeline import NOVAPipeline
from .outputs import write_sample
from .samples import Sample


def make_samples(
    pipeline: NOVAPipeline,
    samples: list[Sample],
    options: dict[str, Any],
    *,
    batch_size: int,
    sheet: bool,
    latents_file: Path | None,
) -> int:
    """Make and write samples; every file appears as soon as its batch is finished.

    Every sample has its own generator, so it does not depend on what else is in its batch.

    Args:
        options: arguments of the pipeline call.
        sheet: write contact sheets beside videos.
        latents_file: also write the latents of all samples here.

    Returns:
        The number of frames made.
    """
    count = 0
    latents: list[Tensor] = []
    for start in range(0, len(samples), batch_size):
        batch = samples[start : start + batch_size]
        conditions = [sample.condition for sample in batch]
        name = "prompt_embeds" if isinstance(conditions[0], Tensor) else "prompt"
        output = pipeline(
            **{name: conditions},
            **options,
            generator=[_generator(pipeline, sample.seed) for sample in batch],
            output_type="uint8",
        )
        clips = output.images[:, None] if output.frames is None else output.frames
        latents.append(output.latents.cpu())
        for sample, frames in zip(batch, clips, strict=True):
            count += len(frames)
            lines = write_sample(
                sample.path, frames, options["fps"], caption=sample.caption, sheet=sheet
            )
            for line in lines:
                typer.echo(line)
    if latents_file is not None:
        save_state_dict({"latents": torch.cat(latents)}, latents_file.parent, latents_file.stem)
        typer.echo(f"{latents_file}: latents")
    return count


def _generator(pipeline: NOVAPipeline, seed: int) -> torch.Generator:
    return torch.Generator(pipeline.device).manual_seed(seed)
