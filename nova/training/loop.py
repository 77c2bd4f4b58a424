"""Training a NOVA transformer on encoded clips."""

from pathlib import Path

import torch

from ..checkpoint import load_state_dict, load_strict, read_json
from ..config import ModelConfig
from ..data import LatentDataset
from ..errors import InputError
from ..model import NOVATransformer
from ..pipeline import NOVAPipeline
from ..schedule import SchedulerConfig
from .activation_checkpointing import activation_checkpointing
from .checkpoints import FrozenParts
from .engine import Engine, make_accelerator
from .objective import NOVAObjective
from .options import TrainingOptions
from .parameters import freeze
from .run import OnStep, Weights, find_resumed, read_position, run_steps
from .samples import StepSampler, TrainingSamples, collate, load_batches
from .sheets import SheetConditions, load_codec, write_sample_sheet
from .state import load_training_state

# A run goes on exactly under the same values of these.
_FIXED = ("seed", "loss_repeats", "prompt_dropout", "freeze_text_norm", "freeze_motion")


def train(
    model: NOVATransformer,
    scheduler: SchedulerConfig,
    data: LatentDataset,
    options: TrainingOptions,
    parts: FrozenParts | None = None,
    on_step: OnStep | None = None,
) -> Path:
    """Train, and write checkpoints that `NOVAPipeline.from_pretrained` opens.

    Args:
        model: float32, what to start from. It is trained in place; a resumed run puts the
            weights of its checkpoint into it.
        scheduler: how noise is added, and the sampler of the checkpoints.
        data: encoded clips; their geometry decides between images and clips.
        options: see `TrainingOptions`.
        parts: VAE, text encoder and tokenizer that checkpoints carry along; without a VAE there
            are no contact sheets.
        on_step: called after every step with the number of steps done and its metrics.

    Returns:
        The last checkpoint's folder.

    Raises:
        InputError: data and model do not fit, the batch cannot be split, or `out` has checkpoints
            already and `resume` was not asked for.
        DivergenceError: the loss is not finite, or far beyond what it was; checkpoints stay.
        DependencyError: accelerate is not installed.
    """
    accelerator = make_accelerator(options)
    samples = TrainingSamples(data, model.config, scheduler, options)
    resumed = find_resumed(options, _FIXED)
    if resumed is not None:
        load_strict(model, load_state_dict(resumed / "transformer"), str(resumed / "transformer"))
    parts = FrozenParts() if parts is None else parts
    check_vae(data, parts)
    task = NOVATask(samples, parts)
    num_frames = data.latent_shape[1]
    freeze(model, num_frames, text_norm=options.freeze_text_norm, motion=options.freeze_motion)
    engine = Engine(accelerator, NOVAObjective(model, scheduler), options)
    if resumed is not None:
        load_training_state(engine, resumed)
    rank, world_size = accelerator.process_index, accelerator.num_processes
    sampler = StepSampler(options, *read_position(resumed), rank, world_size)
    batches = load_batches(samples, sampler, collate, options.workers)
    with activation_checkpointing(model, options.activation_checkpointing):
        per_step = sampler.micro_batches_per_step
        return run_steps(engine, task, batches, per_step, options, resumed, on_step)


def check_vae(data: LatentDataset, parts: FrozenParts) -> None:
    """Whether the data may have been encoded with the VAE that checkpoints will carry.

    Raises:
        InputError: they scale or shift latents differently.
    """
    if "vae" not in parts.folders:
        return
    folder, index = parts.folders["vae"], data.index
    config = read_json(folder / "config.json")
    # A scaling factor that is not there is unknown, a shift that is not there is none.
    factor = config.get("scaling_factor") or index.scaling_factor
    shift = config.get("shift_factor") or 0.0
    for name, encoded, carried in (
        ("scaling factor", index.scaling_factor, factor),
        ("shift factor", index.shift_factor, shift),
    ):
        if carried != encoded:
            raise InputError(
                f"{data.folder} was encoded with a VAE of {name} {encoded}, {folder} has "
                f"{carried}; encode again, or take the VAE that encoded it"
            )


class NOVATask:
    """Checkpoints as pipeline folders, sheets of sampled clips. See `run.Task`."""

    def __init__(self, samples: TrainingSamples, parts: FrozenParts):
        self._samples, self._parts = samples, parts
        self._options, self._config = samples.options, samples.config
        self._scheduler = samples.scheduler
        self._codec = load_codec(parts) if self._options.sample_every else None
        if self._codec is not None:
            length = self._config.text_token_len if self._config.text_token_dim else None
            self._conditions = SheetConditions.choose(samples.data, self._options, parts, length)

    def metrics(self, step: int) -> dict[str, float]:
        return {"mask_ratio": self._samples.mask_ratio(step)}

    def save(self, folder: Path, weights: Weights) -> None:
        NOVAPipeline(_model_of(weights, self._config), self._scheduler).save_pretrained(folder)
        self._parts.link_into(folder)

    def write_sheet(self, path: Path, weights: Weights, device: torch.device) -> None:
        if self._codec is None:
            return
        model = _model_of(weights, self._config)
        pipeline = NOVAPipeline(model, self._scheduler, self._codec).to(device)
        num_frames = self._samples.data.latent_shape[1]
        write_sample_sheet(path, pipeline, self._conditions, self._options, num_frames)
        self._codec.module.to("cpu")


def _model_of(weights: Weights, config: ModelConfig) -> NOVATransformer:
    with torch.device("meta"):
        model = NOVATransformer(config)
    # The objective's parameters are the model's behind a prefix.
    renamed = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    load_strict(model, renamed, "the training")
    return model
