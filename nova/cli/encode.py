"""`nova encode`: captioned clips become latents and embeddings, once."""

from pathlib import Path
from typing import Annotated

import typer

from ..training.options import PRECISIONS
from . import options as shared
from .errors import DebugOption
from .options import DATA, FILES, RUN, option
from .sources import open_source


def encode(
    source: shared.Source,
    *,
    out: Annotated[
        Path, option("--out", panel=FILES, metavar="FOLDER", help="Folder of the shards.")
    ],
    model: Annotated[
        str | None,
        option(
            "--model",
            panel=DATA,
            metavar="FOLDER|ID",
            help="Checkpoint whose VAE, text encoder and sizes are used.",
        ),
    ] = None,
    vae: Annotated[Path | None, option("--vae", panel=DATA, help="A vae/ folder.")] = None,
    text_encoder: Annotated[
        Path | None,
        option(
            "--text-encoder",
            panel=DATA,
            help="Folder with text_encoder/ and tokenizer/; without one, class labels are kept.",
        ),
    ] = None,
    text_length: Annotated[
        int,
        option(
            "--text-length",
            panel=DATA,
            min=1,
            help="Tokens kept of a caption, the text_token_len of the model to train; --model says "
            "its own.",
        ),
    ] = 256,
    captions: shared.Captions = None,
    size: Annotated[
        tuple[int, int] | None,
        option(
            "--size",
            panel=DATA,
            metavar="H W",
            show_default="the model's",
            help="Height and width in pixels.",
        ),
    ] = None,
    frames: shared.Frames = 17,
    fps: shared.Fps = 12.0,
    clips: shared.Clips = 10_000,
    shapes_seed: shared.ShapesSeed = 0,
    shard_size: Annotated[
        int, option("--shard-size", panel=FILES, min=1, help="Clips of a file.")
    ] = 256,
    dtype: Annotated[
        str, option("--dtype", panel=FILES, help="Stored as float16, bfloat16 or float32.")
    ] = "float16",
    batch_size: Annotated[
        int, option("--batch-size", panel=RUN, min=1, help="Clips encoded at a time.")
    ] = 1,
    precision: Annotated[
        str,
        option("--precision", panel=RUN, help="What the VAE computes in: float32 or bfloat16."),
    ] = "float32",
    workers: shared.Workers = 0,
    device: Annotated[
        str | None,
        option("--device", panel=RUN, show_default="the GPU, if there is one", help="cpu, cuda..."),
    ] = None,
    quiet: shared.Quiet = False,
    debug: DebugOption = False,
) -> None:
    """Encode captioned videos or images once, for `nova train`. Run again, it goes on.

    nova encode clips/ --model BAAI/nova-d48w1024-osp480 --frames 33 --out data/
    """
    if (model is None) == (vae is None):
        raise typer.BadParameter("Give one of --model and --vae.")
    if precision not in PRECISIONS:
        raise typer.BadParameter(f"--precision must be one of {', '.join(PRECISIONS)}.")
    if size is None and model is None:
        raise typer.BadParameter("Give --size, as there is no --model to take it from.")

    from ..data import encode_clips
    from .device import choose_device
    from .model import hide_loading_bars
    from .parts import load_encoders

    run_device = choose_device(device)
    if quiet:
        hide_loading_bars()
    codec, encoder, model_size = load_encoders(
        model, vae, text_encoder, text_length, run_device, precision
    )
    height, width = size or model_size
    clip_source = open_source(source, frames, height, width, fps, captions, clips, shapes_seed)
    index = encode_clips(
        clip_source,
        out,
        codec,
        encoder,
        shard_size=shard_size,
        batch_size=batch_size,
        dtype=dtype,
        workers=workers,
        show_progress=not quiet,
    )
    skipped = sum(len(shard.skipped) for shard in index.shards)
    shape = " x ".join(map(str, index.latent_shape))
    typer.echo(f"{out}: {index.samples} clips, latents of {shape}")
    if skipped:
        typer.echo(f"{out / 'skipped.txt'}: {skipped} clips that could not be used")
