"""`nova encode`, `nova train`, `nova train-vae`, `nova train-text-encoder`.

All but `encode` may be started by `accelerate launch -m nova ...` as well.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..training.options import PRECISIONS, TrainingOptions, VAETrainingOptions
from . import train_options as shared
from .errors import DebugOption
from .train_options import DATA, FILES, RUN, option

if TYPE_CHECKING:
    from ..data import ClipSource, ShapesSource
    from ..training.text_encoder import CaptionLabels
    from .parts import TrainedModel

SHAPES = "shapes"


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
        int, option("--text-length", panel=DATA, min=1, help="Tokens kept of a caption.")
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
    from .parts import load_encoders

    run_device = choose_device(device)
    codec, encoder, model_size = load_encoders(
        model, vae, text_encoder, text_length, run_device, precision
    )
    height, width = size or model_size
    clip_source = _open_source(source, frames, height, width, fps, captions, clips, shapes_seed)
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
    from ..training.loop import train as run
    from .parts import fresh_model, released_model

    dataset = LatentDataset(data, max_latent_length=max_latent_length)
    trained: TrainedModel
    if model is not None:
        trained = released_model(model, text_encoder, seed)
    else:
        trained = fresh_model(config, vae, text_encoder, ddpm=ddpm, seed=seed)
    _echo(f"{data}: {len(dataset)} clips; {trained.parameters / 1e6:.1f} M parameters")
    _echo(f"wrote {run(trained.model, trained.scheduler, dataset, options, trained.parts)}")


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

    from ..training.vae_loop import train_vae as run
    from .parts import open_vae

    clip_source = _open_source(
        source, frames, *size, fps, captions, clips, shapes_seed, frames_only=True
    )
    module = open_vae(config, vae, seed)
    count = sum(parameter.numel() for parameter in module.parameters())
    _echo(f"{source}: {len(clip_source)} clips; {count / 1e6:.1f} M parameters")
    _echo(f"wrote {run(module, clip_source, options)}")


def train_text_encoder(
    source: shared.Source,
    *,
    out: Annotated[
        Path,
        option("--out", panel=FILES, metavar="FOLDER", help="Gets text_encoder/ and tokenizer/."),
    ],
    captions: shared.Captions = None,
    clips: shared.Clips = 10_000,
    shapes_seed: shared.ShapesSeed = 0,
    width: Annotated[int, option("--width", panel=RUN, min=16, help="Of the embeddings.")] = 64,
    layers: Annotated[int, option("--layers", panel=RUN, min=1, help="Blocks.")] = 2,
    heads: Annotated[int, option("--heads", panel=RUN, min=1, help="Attention heads.")] = 4,
    vocabulary: Annotated[
        int, option("--vocabulary", panel=RUN, min=257, help="Tokens, at most.")
    ] = 512,
    steps: Annotated[int, option("--steps", panel=RUN, min=0, help="Optimiser steps.")] = 500,
    batch_size: Annotated[int, option("--batch-size", panel=RUN, min=1, help="Captions.")] = 32,
    lr: Annotated[float, option("--lr", panel=RUN, help="Learning rate.")] = 2e-3,
    labels: Annotated[
        bool,
        option(
            "--labels",
            panel=RUN,
            help="Learn to tell what a caption says (shapes only), not its next token.",
        ),
    ] = False,
    seed: shared.Seed = 0,
    quiet: shared.Quiet = False,
    debug: DebugOption = False,
) -> None:
    """Train a small text encoder and its tokenizer on captions alone.

    nova train-text-encoder shapes --labels --clips 60000 --steps 5000 --out runs/text
    """
    from ..errors import NovaError
    from ..training.text_encoder import TextEncoderOptions, make_text_encoder

    if labels and source != SHAPES:
        raise typer.BadParameter(
            "what captions say is known of shapes alone; leave --labels out", param_hint="--labels"
        )
    # Frames are not read, whatever their size and rate.
    clip_source = _open_source(source, 1, 64, 64, 12.0, captions, clips, shapes_seed)
    sentences = []
    for index in range(len(clip_source)):
        try:
            sentences.append(clip_source.caption(index))
        except NovaError as error:
            _echo(f"left out: {error}")
    options = TextEncoderOptions(
        hidden_size=width,
        num_layers=layers,
        num_heads=heads,
        vocab_size=vocabulary,
        steps=steps,
        batch_size=batch_size,
        learning_rate=lr,
        seed=seed,
    )
    losses: list[float] = []
    folders = make_text_encoder(
        [sentence for sentence in sentences if sentence],
        out,
        options,
        labels=_shapes_labels(clip_source) if labels else None,
        on_step=lambda _, loss: losses.append(loss),
        show_progress=not quiet,
    )
    if losses:
        unit = "caption" if labels else "token"
        _echo(f"loss {losses[0]:.3f} to {losses[-1]:.3f} nats a {unit}")
    _echo(f"wrote {folders[0]} and {folders[1]}")


def _shapes_labels(source: "ShapesSource") -> "CaptionLabels":
    import torch

    from ..shapes.labels import QUESTIONS
    from ..training.text_encoder import CaptionLabels

    answers = torch.tensor([source.labels(index) for index in range(len(source))])
    return CaptionLabels(answers, tuple(len(possible) for possible in QUESTIONS.values()))


def _open_source(
    name: str,
    frames: int,
    height: int,
    width: int,
    fps: float,
    captions: Path | None,
    clips: int,
    seed: int,
    *,
    frames_only: bool = False,
) -> "ClipSource":
    from ..data import ClipFormat, FolderSource, ShapesSource

    clip_format = ClipFormat(frames, height, width, fps)
    if name == SHAPES:
        return ShapesSource(clips, clip_format, seed, frames_only=frames_only)
    return FolderSource(name, clip_format, captions, frames_only=frames_only)


def _echo(line: str) -> None:
    """Print on the first of several processes."""
    if os.environ.get("RANK", "0") == "0":
        typer.echo(line)
