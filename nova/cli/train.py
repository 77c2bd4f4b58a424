"""`nova train`; `accelerate launch -m nova train` starts it on several GPUs."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..training.options import TrainingOptions
from . import options as shared
from .errors import DebugOption
from .options import DATA, FILES, RUN, option
from .sources import echo

if TYPE_CHECKING:
    from .parts import TrainedModel


def train(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="Folder made by nova encode.")],
    *,
    out: shared.Out,
    model: Annotated[
        str | None,
        option(
            "--model",
            panel=DATA,
            metavar="FOLDER|ID",
            help="Checkpoint to fine-tune; its VAE and text encoder go into the new ones.",
        ),
    ] = None,
    config: Annotated[
        str | None,
        option(
            "--config",
            panel=DATA,
            metavar="NAME|FILE",
            help="Train from nothing: a named size such as small-video, or a config.json.",
        ),
    ] = None,
    vae: Annotated[
        Path | None,
        option("--vae", panel=DATA, help="With --config: a vae/ folder to carry along."),
    ] = None,
    text_encoder: Annotated[
        Path | None,
        option(
            "--text-encoder",
            panel=DATA,
            help="Folder with text_encoder/ and tokenizer/ to carry along. With --model: in place "
            "of the checkpoint's; text projection and video encoder start anew.",
        ),
    ] = None,
    max_latent_length: Annotated[
        int | None,
        option(
            "--max-latent-length",
            panel=DATA,
            min=1,
            show_default="whole clips",
            help="Latent frames from the start of every clip: shorter clips cost less.",
        ),
    ] = None,
    ddpm: Annotated[
        bool, option("--ddpm", panel=DATA, help="With --config: DDPM (epsilon), not flow matching.")
    ] = False,
    steps: shared.Steps = TrainingOptions.steps,
    batch_size: shared.BatchSize = TrainingOptions.batch_size,
    micro_batch_size: shared.MicroBatchSize = None,
    lr: shared.LearningRate = TrainingOptions.learning_rate,
    warmup: shared.Warmup = TrainingOptions.warmup_steps,
    schedule: shared.Schedule = TrainingOptions.schedule,
    optimizer: shared.Optimizer = TrainingOptions.optimizer,
    weight_decay: shared.WeightDecay = TrainingOptions.weight_decay,
    max_grad_norm: shared.GradNorm = TrainingOptions.max_grad_norm,
    ema: shared.EMADecay = TrainingOptions.ema_decay,
    loss_repeats: Annotated[
        int, option("--loss-repeats", panel=RUN, min=1, help="Noise draws for every token.")
    ] = TrainingOptions.loss_repeats,
    prompt_dropout: Annotated[
        float, option("--prompt-dropout", panel=RUN, help="Share of prompts left out.")
    ] = TrainingOptions.prompt_dropout,
    mask_ratio_std: Annotated[
        float,
        option(
            "--mask-ratio-std",
            panel=RUN,
            help="Spread of the share of masked tokens; large: about uniform.",
        ),
    ] = TrainingOptions.mask_ratio_std,
    mask_ratio_min: Annotated[
        float,
        option(
            "--mask-ratio-min", panel=RUN, help="Least share of a frame's tokens that is masked."
        ),
    ] = TrainingOptions.mask_ratio_min,
    freeze_motion: Annotated[
        bool | None,
        option(
            "--freeze-motion/--train-motion",
            panel=RUN,
            show_default="frozen with --model",
            help="Keep the motion embedding as it is.",
        ),
    ] = None,
    checkpointing: Annotated[
        int,
        option(
            "--activation-checkpointing",
            panel=RUN,
            min=0,
            max=3,
            help="Less memory, more time: 1 video encoder, 2 image encoder too, 3 all.",
        ),
    ] = TrainingOptions.activation_checkpointing,
    precision: shared.Precision = TrainingOptions.precision,
    seed: shared.Seed = TrainingOptions.seed,
    save_every: shared.SaveEvery = TrainingOptions.save_every,
    keep: shared.Keep = TrainingOptions.keep,
    log_every: shared.LogEvery = TrainingOptions.log_every,
    sample_every: shared.SampleEvery = TrainingOptions.sample_every,
    sample_prompt: Annotated[
        list[str] | None,
        option(
            "--sample-prompt",
            panel=FILES,
            show_default="captions of the data",
            help="Sentence on the contact sheets; may be repeated.",
        ),
    ] = None,
    sample_steps: Annotated[
        int, option("--sample-steps", panel=FILES, min=1, help="Sets a frame, for the sheets.")
    ] = TrainingOptions.sample_steps,
    sample_diffusion_steps: Annotated[
        int, option("--sample-diffusion-steps", panel=FILES, min=1, help="For the sheets.")
    ] = TrainingOptions.sample_diffusion_steps,
    sample_guidance: Annotated[
        float, option("--sample-guidance", panel=FILES, help="For the sheets.")
    ] = TrainingOptions.sample_guidance,
    workers: shared.Workers = 0,
    resume: shared.Resume = False,
    device: shared.Device = None,
    quiet: shared.Quiet = False,
    debug: DebugOption = False,
) -> None:
    """Train on encoded clips. On several GPUs: accelerate launch -m nova train ...

    nova train data/ --model BAAI/nova-d48w1024-osp480 --precision bfloat16 --out runs/tuned
    """
    if (model is None) == (config is None):
        raise typer.BadParameter("Give one of --model and --config.")
    if model is not None and (vae or ddpm):
        raise typer.BadParameter("--vae and --ddpm go with --config.")
    options = TrainingOptions(
        out=out,
        steps=steps,
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        learning_rate=lr,
        warmup_steps=warmup,
        schedule=schedule,
        optimizer=optimizer,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        ema_decay=ema,
        loss_repeats=loss_repeats,
        prompt_dropout=prompt_dropout,
        mask_ratio_std=mask_ratio_std,
        mask_ratio_min=mask_ratio_min,
        freeze_motion=model is not None if freeze_motion is None else freeze_motion,
        activation_checkpointing=checkpointing,
        precision=precision,
        seed=seed,
        save_every=save_every,
        keep=keep,
        log_every=log_every,
        sample_every=sample_every,
        sample_prompts=tuple(sample_prompt or ()),
        sample_steps=sample_steps,
        sample_diffusion_steps=sample_diffusion_steps,
        sample_guidance=sample_guidance,
        workers=workers,
        resume=resume,
        device=device,
        progress=not quiet,
    )

    from ..data import LatentDataset
    from ..output_folder import make_output_folder
    from ..training.loop import train as run
    from .model import hide_loading_bars
    from .parts import fresh_model, released_model

    dataset = LatentDataset(data, max_latent_length=max_latent_length)
    make_output_folder(options.out)
    if quiet:
        hide_loading_bars()  # of the text encoder, for sentences on the sheets
    trained: TrainedModel
    if model is not None:
        trained = released_model(model, text_encoder, seed)
    else:
        trained = fresh_model(config, vae, text_encoder, ddpm=ddpm, seed=seed)
    echo(f"{data}: {len(dataset)} clips; {trained.num_parameters / 1e6:.1f} M parameters")
    echo(f"wrote {run(trained.model, trained.scheduler, dataset, options, trained.parts)}")
