"""`nova train-vae`; `accelerate launch -m nova train-vae` starts it on several GPUs."""

from pathlib import Path
from typing import Annotated

import typer

from ..training.options import VAETrainingOptions
from . import options as shared
from .errors import DebugOption
from .options import DATA, RUN, option
from .sources import echo, open_source


def train_vae(
    source: shared.Source,
    *,
    out: shared.Out,
    size: shared.Size,
    frames: shared.Frames = 17,
    fps: shared.Fps = 12.0,
    captions: shared.Captions = None,
    clips: shared.Clips = 10_000,
    shapes_seed: shared.ShapesSeed = 0,
    config: Annotated[
        str | None,
        option("--config", panel=DATA, metavar="tiny|osp|FILE", help="Train from nothing."),
    ] = None,
    vae: Annotated[
        Path | None, option("--vae", panel=DATA, help="Go on from this vae/ folder.")
    ] = None,
    steps: shared.Steps = VAETrainingOptions.steps,
    batch_size: shared.BatchSize = VAETrainingOptions.batch_size,
    micro_batch_size: shared.MicroBatchSize = None,
    lr: shared.LearningRate = VAETrainingOptions.learning_rate,
    warmup: shared.Warmup = VAETrainingOptions.warmup_steps,
    schedule: shared.Schedule = VAETrainingOptions.schedule,
    weight_decay: shared.WeightDecay = VAETrainingOptions.weight_decay,
    max_grad_norm: shared.GradNorm = VAETrainingOptions.max_grad_norm,
    ema: shared.EMADecay = VAETrainingOptions.ema_decay,
    crop: Annotated[
        int | None,
        option(
            "--crop",
            panel=DATA,
            min=1,
            show_default="whole frames",
            help="Side in pixels of random crops to train on.",
        ),
    ] = VAETrainingOptions.crop,
    freeze_encoder: Annotated[
        bool,
        option(
            "--freeze-encoder",
            panel=RUN,
            help="Train the decoder alone: models trained on the latents stay valid.",
        ),
    ] = False,
    kl_weight: Annotated[
        float, option("--kl-weight", panel=RUN, help="Weight of the KL divergence.")
    ] = VAETrainingOptions.kl_weight,
    mse_weight: Annotated[
        float, option("--mse-weight", panel=RUN, help="Weight of the mean squared error.")
    ] = VAETrainingOptions.mse_weight,
    edge_weight: Annotated[
        float, option("--edge-weight", panel=RUN, help="Weight of differences of neighbours.")
    ] = VAETrainingOptions.edge_weight,
    precision: shared.Precision = VAETrainingOptions.precision,
    seed: shared.Seed = VAETrainingOptions.seed,
    save_every: shared.SaveEvery = VAETrainingOptions.save_every,
    keep: shared.Keep = VAETrainingOptions.keep,
    log_every: shared.LogEvery = VAETrainingOptions.log_every,
    sample_every: shared.SampleEvery = VAETrainingOptions.sample_every,
    workers: shared.Workers = 0,
    resume: shared.Resume = False,
    device: shared.Device = None,
    quiet: shared.Quiet = False,
    debug: DebugOption = False,
) -> None:
    """Train a video VAE on the frames of videos or of `shapes`.

    nova train-vae shapes --size 64 64 --config tiny --out runs/vae
    """
    if (config is None) == (vae is None):
        raise typer.BadParameter("Give one of --config and --vae.")
    options = VAETrainingOptions(
        out=out,
        steps=steps,
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        learning_rate=lr,
        warmup_steps=warmup,
        schedule=schedule,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        ema_decay=ema,
        crop=crop,
        freeze_encoder=freeze_encoder,
        kl_weight=kl_weight,
        mse_weight=mse_weight,
        edge_weight=edge_weight,
        precision=precision,
        seed=seed,
        save_every=save_every,
        keep=keep,
        log_every=log_every,
        sample_every=sample_every,
        workers=workers,
        resume=resume,
        device=device,
        progress=not quiet,
    )

    from ..output_folder import make_output_folder
    from ..training.vae_loop import train_vae as run
    from .parts import open_vae

    clip_source = open_source(
        source, frames, *size, fps, captions, clips, shapes_seed, frames_only=True
    )
    make_output_folder(options.out)
    module = open_vae(config, vae, seed)
    count = sum(parameter.numel() for parameter in module.parameters())
    echo(f"{source}: {len(clip_source)} clips; {count / 1e6:.1f} M parameters")
    echo(f"wrote {run(module, clip_source, options)}")
