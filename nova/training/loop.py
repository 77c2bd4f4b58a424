"""Training a NOVA transformer on encoded clips."""

from pathlib import Path

import torch

from ..checkpoint import load_strict, read_json
from ..config import ModelConfig
from ..data import LatentDataset
from ..errors import InputError
from ..model import NOVATransformer
from ..pipeline import NOVAPipeline
from ..schedule import FlowMatchConfig, SchedulerConfig, scheduler_from_dict
from .activation_checkpointing import activation_checkpointing
from .checkpoints import FrozenParts
from .engine import Engine, make_accelerator
from .objective import NOVAObjective
from .options import TrainingOptions
from .parameters import check_trainable, freeze
from .run import OnStep, Weights, find_resumed, read_position, run_steps, training_run
from .samples import StepSampler, TrainingSamples, collate, load_batches
from .sheets import SheetConditions, load_codec, write_sample_sheet
from .state import load_averaged_weights, load_training_state

# A run goes on exactly under the same values of these.
_FIXED = (
    "seed",
    "optimizer",
    "loss_repeats",
    "prompt_dropout",
    "freeze_text_norm",
    "freeze_motion",
)


@training_run(less_memory="activation_checkpointing")
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
            weights of its checkpoint into it. Parameters that were frozen, as those of a pipeline
            are, become trainable, but for what `parameters.freeze` names. Parts may be wrapped by
            torch.compile.
        scheduler: how noise is added, and the sampler of the checkpoints.
        data: encoded clips; their geometry decides between images and clips.
        options: see `TrainingOptions`.
        parts: VAE, text encoder and tokenizer that checkpoints carry along; without a VAE there
            are no contact sheets.
        on_step: called after every step with the number of steps done and its metrics.

    Returns:
        The last checkpoint's folder.

    Raises:
        InputError: the model is not float32, data and model do not fit, the batch cannot be split,
            `out` has checkpoints already and `resume` was not asked for, or the resumed run was
            of a VAE, or had another seed, optimizer or scheduler.
        CheckpointError: the model has adapters or quantised layers, for which checkpoints have no
            place; files of the resumed run are missing or damaged.
        DivergenceError: the loss is not finite, or far beyond what it was; checkpoints stay.
        DeviceError: memory is short, or a process that reads data was lost; checkpoints stay.
        DependencyError: accelerate is not installed.
        MediaError: `out` cannot be made, or not be written into.
    """
    check_trainable(model, _empty_model(model.config), "the model to train")
    accelerator = make_accelerator(options)
    samples = TrainingSamples(data, model.config, scheduler, options)
    resumed = find_resumed(options, _FIXED)
    if resumed is not None:
        check_scheduler(resumed, scheduler)
        load_averaged_weights(model, _empty_model(model.config), resumed / "transformer")
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
    batches = load_batches(samples, sampler, collate, options.workers, accelerator.device)
    with activation_checkpointing(model, options.activation_checkpointing):
        per_step = sampler.micro_batches_per_step
        return run_steps(engine, task, batches, per_step, options, resumed, on_step)


def check_scheduler(resumed: Path, scheduler: SchedulerConfig) -> None:
    """Whether a run's checkpoint was trained with this scheduler.

    Raises:
        InputError: it was another one, so that going on would change the objective.
        CheckpointError, ConfigError: what is wrong with the checkpoint's file.
    """
    path = resumed / "scheduler" / "scheduler_config.json"
    # A file may name a class for sampling and one for training; the objective is the latter's.
    before = scheduler_from_dict(read_json(path), kind="noise")
    if type(before) is not type(scheduler):
        names = _objective_name(before), _objective_name(scheduler)
        raise InputError(
            f"this run was started with {names[0]}, not {names[1]}; go on with the same"
        )
    given = vars(scheduler)
    changed = [f"{name}={value!r}" for name, value in vars(before).items() if given[name] != value]
    if changed:
        raise InputError(
            f"this run was started with a scheduler of {', '.join(changed)}; go on with the same"
        )


def _objective_name(scheduler: SchedulerConfig) -> str:
    return "flow matching" if isinstance(scheduler, FlowMatchConfig) else "DDPM (--ddpm)"


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
            self._scheduler.schedule(self._options.sample_diffusion_steps)  # before the first step
            length = self._config.text_token_len if self._config.text_token_dim else None
            self._conditions = SheetConditions.choose(samples.data, self._options, parts, length)

    def metrics(self, step: int) -> dict[str, float]:
        return {"mask_ratio": self._samples.mask_ratio(step)}

    def save(self, folder: Path, weights: Weights, device: torch.device) -> None:
        model = _model_of(weights, self._config)
        recommended = self._parts.generation_config
        pipeline = NOVAPipeline(model, self._scheduler, generation_config=recommended)
        pipeline.save_pretrained(folder)
        self._parts.link_into(folder)

    def write_sheet(self, path: Path, weights: Weights, device: torch.device) -> None:
        if self._codec is None:
            return
        model = _model_of(weights, self._config)
        pipeline = NOVAPipeline(model, self._scheduler, self._codec).to(device)
        num_frames = self._samples.data.latent_shape[1]
        write_sample_sheet(path, pipeline, self._conditions, self._options, num_frames)
        self._codec.module.to("cpu")


def _empty_model(config: ModelConfig) -> NOVATransformer:
    with torch.device("meta"):
        return NOVATransformer(config)


def _model_of(weights: Weights, config: ModelConfig) -> NOVATransformer:
    model = _empty_model(config)
    # The objective's parameters are the model's behind a prefix.
    renamed = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    load_strict(model, renamed, "the training")
    return model
