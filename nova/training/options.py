"""Options of a training run, checked when they are made."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

from ..errors import InputError
from ..numeric import check_finite, check_whole, is_finite_number, whole_number

SCHEDULES = ("constant", "cosine")
PRECISIONS = ("float32", "bfloat16")
OPTIMIZERS = ("adamw", "muon")
# Generators take seeds below 2^63; every clip of a sheet, and every worker, adds its number.
LARGEST_SEED = 2**62


def check_seed(options: Any) -> None:
    """Raise InputError unless `seed` of a frozen dataclass is one that generators take."""
    check_whole(options, "seed", least=0)
    if options.seed > LARGEST_SEED:
        raise InputError(f"seed must be at most 2^62, got {options.seed}")


def _check_flags(options: Any, *names: str) -> None:
    """Raise InputError unless these attributes are truth values; NumPy's become Python's."""
    for name in names:
        value = getattr(options, name)
        # By name: the commands read defaults from here, and start sooner without NumPy.
        if type(value).__name__ not in ("bool", "bool_"):
            raise InputError(f"{name} must be True or False, got {value!r}")
        object.__setattr__(options, name, bool(value))


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What every training has: where it writes, how long it runs, how it optimises.

    Attributes:
        out: folder of the run: checkpoints/, samples/, metrics.csv, metrics.png.
        steps: optimiser steps in all, those before a resume included.
        batch_size: samples of an optimiser step, over all processes.
        micro_batch_size: samples that a process computes at a time; the rest is accumulated.
            None: all of its share. The result does not depend on it.
        learning_rate: after the warm-up.
        warmup_steps: linear, from 0.
        schedule: "constant", or "cosine" towards min_learning_rate, which a step after the last
            would have.
        optimizer: "adamw", or "muon" (see `parameters.make_optimizers`).
        betas: of AdamW.
        weight_decay: of weights of two and more dimensions.
        max_grad_norm: gradients are scaled down to this norm; inf: never.
        ema_decay: of the averaged weights, which checkpoints offer for use. In the first steps it
            is (1 + step) / (10 + step), where that is less.
        seed: of all that is random.
        precision: "float32", or "bfloat16" for automatic mixed precision; weights stay float32.
        device: "cpu" to keep off a GPU; None for what accelerate chooses.
        save_every: steps between checkpoints; one is written at the end in any case.
        keep: so many of the newest checkpoints are kept.
        log_every: steps between rows of metrics.csv.
        sample_every: steps between contact sheets; 0: none.
        workers: processes that read data; 0: the training process reads.
        resume: go on from the newest checkpoint in `out`, if there is one.
        progress: show a progress bar.

    Raises:
        InputError: a value that is out of range.
    """

    out: Path
    steps: int = 10_000
    batch_size: int = 8
    micro_batch_size: int | None = None
    learning_rate: float = 1e-4
    min_learning_rate: float = 1e-6
    warmup_steps: int = 500
    schedule: str = "constant"
    optimizer: str = "adamw"
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.02
    max_grad_norm: float = 1.0
    ema_decay: float = 0.9999
    seed: int = 0
    precision: str = "float32"
    device: str | None = None
    save_every: int = 1000
    keep: int = 3
    log_every: int = 10
    sample_every: int = 1000
    workers: int = 0
    resume: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        # Absolute: the script that trains may go to another folder between two steps.
        object.__setattr__(self, "out", Path(self.out).expanduser().absolute())
        check_whole(self, "steps", "batch_size", "save_every", "keep", "log_every", least=1)
        check_whole(self, "warmup_steps", "sample_every", "workers", least=0)
        check_seed(self)
        _check_flags(self, "resume", "progress")
        if self.micro_batch_size is not None:
            check_whole(self, "micro_batch_size", least=1)
        check_finite(
            self, "learning_rate", "min_learning_rate", "weight_decay", "ema_decay", least=0
        )
        betas = tuple(self.betas) if isinstance(self.betas, Iterable) else ()
        if len(betas) != 2 or not all(map(is_finite_number, betas)):
            raise InputError(f"betas must be two numbers, got {self.betas!r}")
        object.__setattr__(self, "betas", tuple(map(float, betas)))
        if not all(0 <= beta < 1 for beta in (*self.betas, self.ema_decay)):
            raise InputError("betas and ema_decay must lie in [0, 1)")
        if self.max_grad_norm != math.inf:
            check_finite(self, "max_grad_norm", least=0)
        if self.max_grad_norm == 0:
            raise InputError("max_grad_norm must be positive, got 0")
        for name, choices in (
            ("schedule", SCHEDULES),
            ("optimizer", OPTIMIZERS),
            ("precision", PRECISIONS),
        ):
            if getattr(self, name) not in choices:
                raise InputError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        if self.device not in (None, "cpu"):
            raise InputError(f"device must be cpu or left out, got {self.device!r}")


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(RunOptions):
    """Options of `train`. Defaults are the reference's for fine-tuning.

    Attributes:
        loss_repeats: draws of noise and timestep for every token of a step.
        prompt_dropout: share of samples whose prompt or class is replaced by the null one.
        mask_ratio_mean, mask_ratio_std, mask_ratio_min: of the truncated normal distribution on
            [min, 1] that the share of masked tokens is drawn from, once a step.
        freeze_text_norm: keep the LayerNorm of the text or class embedding as it is.
        freeze_motion: keep the motion embedding as it is; a model trained from nothing needs False.
        activation_checkpointing: 0 none, 1 video encoder, 2 image encoder too, 3 diffusion MLP
            too: less memory, more time.
        sample_prompts: sentences of the contact sheets; empty: captions (or classes) of the data.
        num_samples: clips on a sheet that takes them from the data.
        sample_steps, sample_diffusion_steps, sample_guidance: of the sampler for the sheets.
    """

    loss_repeats: int = 4
    prompt_dropout: float = 0.1
    mask_ratio_mean: float = 1.0
    mask_ratio_std: float = 0.25
    mask_ratio_min: float = 0.7
    freeze_text_norm: bool = True
    freeze_motion: bool = True
    activation_checkpointing: int = 0
    sample_prompts: tuple[str, ...] = ()
    num_samples: int = 4
    sample_steps: int = 32
    sample_diffusion_steps: int = 25
    sample_guidance: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(
            self, "loss_repeats", "num_samples", "sample_steps", "sample_diffusion_steps", least=1
        )
        _check_flags(self, "freeze_text_norm", "freeze_motion")
        given = self.sample_prompts
        is_list = isinstance(given, Iterable) and not isinstance(given, str)
        prompts = tuple(given) if is_list else (None,)
        if not all(isinstance(prompt, str) for prompt in prompts):
            raise InputError(f"sample_prompts must be a tuple of sentences, got {given!r}")
        object.__setattr__(self, "sample_prompts", tuple(map(str, prompts)))
        check_finite(self, "sample_guidance", "mask_ratio_mean")
        check_finite(self, "prompt_dropout", "mask_ratio_std", "mask_ratio_min", least=0)
        if self.prompt_dropout > 1:
            raise InputError(f"prompt_dropout must lie in [0, 1], got {self.prompt_dropout}")
        if not (0 < self.mask_ratio_min < 1 and self.mask_ratio_std > 0):
            raise InputError("mask_ratio_min must lie in (0, 1), and mask_ratio_std be positive")
        ratios = NormalDist(self.mask_ratio_mean, self.mask_ratio_std)
        if not ratios.cdf(self.mask_ratio_min) < ratios.cdf(1.0):
            raise InputError(
                f"mask ratios of mean {self.mask_ratio_mean} and deviation {self.mask_ratio_std} "
                f"hardly ever lie between mask_ratio_min {self.mask_ratio_min} and 1"
            )
        level = whole_number(self.activation_checkpointing)
        if level not in (0, 1, 2, 3):
            raise InputError(
                f"activation_checkpointing must be 0, 1, 2 or 3, got "
                f"{self.activation_checkpointing!r}"
            )
        object.__setattr__(self, "activation_checkpointing", level)


@dataclass(frozen=True, kw_only=True)
class VAETrainingOptions(RunOptions):
    """Options of `train_vae`.

    Attributes:
        crop: side in pixels of random crops to train on, a multiple of the VAE's stride; None:
            whole frames. Crops are cheaper and show more; GroupNorm and attention see the whole
            frame, so that a VAE trained on crops needs some steps on whole frames at the end.
        freeze_encoder: train the decoder alone: better pictures of the same latents, so that models
            trained on them stay valid.
        kl_weight: of the KL divergence (summed over a latent's values, averaged over pixels'
            number of values), small: latents should be smooth, not normal.
        mse_weight: of the mean squared error. Beside the L1 distance, for which the best guess is
            the median, it makes small things on a plain background count from the start.
        edge_weight: of the L1 distance of differences between neighbouring pixels, which keeps
            edges sharp.
        scale_clips: clips whose latents' standard deviation gives the scaling factor.
        num_samples: clips on a contact sheet.
    """

    learning_rate: float = 3e-4
    weight_decay: float = 0.0
    ema_decay: float = 0.999
    crop: int | None = None
    freeze_encoder: bool = False
    kl_weight: float = 1e-6
    mse_weight: float = 1.0
    edge_weight: float = 0.5
    scale_clips: int = 64
    num_samples: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_finite(self, "kl_weight", "mse_weight", "edge_weight", least=0)
        check_whole(self, "scale_clips", "num_samples", least=1)
        _check_flags(self, "freeze_encoder")
        if self.crop is not None:
            check_whole(self, "crop", least=1)


@dataclass(frozen=True)
class TextEncoderOptions:
    """Size of a text encoder, and how it is trained.

    Attributes:
        hidden_size: width of the embeddings (`text_token_dim` of a NOVA config), a multiple of
            4 * num_heads.
        vocab_size: at most; 257 (bytes and the end of text) at least.
        max_length: tokens of a caption; longer ones are cut.
        steps, batch_size, learning_rate: of AdamW, with a cosine schedule after a short warm-up.
            0 steps leave random weights.
        seed: of weights and order.

    Raises:
        InputError: a value that is out of range.
    """

    hidden_size: int = 64
    num_layers: int = 2
    num_heads: int = 4
    vocab_size: int = 512
    max_length: int = 64
    steps: int = 500
    batch_size: int = 32
    learning_rate: float = 2e-3
    seed: int = 0

    def __post_init__(self) -> None:
        sizes = ("hidden_size", "num_layers", "num_heads", "max_length")
        check_whole(self, *sizes, "batch_size", least=1)
        check_whole(self, "steps", least=0)
        check_seed(self)
        check_whole(self, "vocab_size", least=257)
        check_finite(self, "learning_rate", least=0)
        if self.hidden_size % (4 * self.num_heads):
            raise InputError(
                f"hidden_size {self.hidden_size} must be a multiple of 4 * {self.num_heads} heads"
            )
