"""`nova export`: a checkpoint of a training as a folder to use and to share."""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from .errors import DebugOption
from .options import Dtype


def export(
    model: Annotated[
        str, typer.Argument(metavar="FOLDER|ID", help="Checkpoint folder, such as of nova train.")
    ],
    *,
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="The new folder.")],
    dtype: Annotated[Dtype, typer.Option("--dtype", help="Of all weights.")] = Dtype.float16,
    steps: Annotated[
        int | None, typer.Option("--steps", help="Recommended autoregressive steps of a frame.")
    ] = None,
    diffusion_steps: Annotated[
        int | None, typer.Option("--diffusion-steps", help="Recommended denoise steps.")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option("--guidance", help="Recommended guidance.")
    ] = None,
    motion: Annotated[
        float | None, typer.Option("--motion", help="Recommended motion score.")
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Write a checkpoint in half precision, with the settings that it is best sampled with.

    nova export runs/nova/checkpoints/step-00010000 --steps 16 --out my-model
    """
    from ..checkpoint import expand_home

    out = expand_home(out)
    if os.path.exists(out):  # Path's own raises for names that are too long
        raise typer.BadParameter(f"{out} exists; name a new folder.", param_hint="--out")

    import torch

    from ..pipeline import NOVAPipeline

    pipeline = NOVAPipeline.from_pretrained(model, torch_dtype=getattr(torch, dtype.value))
    recommended = {
        "num_inference_steps": steps,
        "num_diffusion_steps": diffusion_steps,
        "guidance_scale": guidance,
        "motion_flow": motion,
    }
    given = {name: value for name, value in recommended.items() if value is not None}
    pipeline.generation_config = replace(pipeline.generation_config, **given)
    try:
        pipeline.save_pretrained(out)
    except BaseException:  # Ctrl-C too: what is left of it would refuse the next attempt
        shutil.rmtree(out, ignore_errors=True)
        raise
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    typer.echo(f"{out}: {size / 1e6:.1f} MB")
