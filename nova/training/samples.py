"""What a step computes on: samples with all their random draws, made by position.

Every draw depends on (seed, position) alone, the mask ratio on (seed, step). So a run goes on
exactly from any step without stored generator states, and does not depend on how a step is divided
among processes and micro-batches, nor on which worker reads a sample.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset, Sampler, default_collate

from ..config import ModelConfig
from ..data import LatentDataset, ShuffledOrder, split_step
from ..data.loading import load
from ..data.seeds import keyed_generator
from ..errors import InputError
from ..model import NULL_CLASS
from ..objective import draw_training_noise
from ..schedule import SchedulerConfig
from .options import TrainingOptions
from .schedule import draw_mask_ratio

_MASK_RATIO, _SAMPLE = 2, 3  # purposes, beside that of the shuffling
_REPEATS_FIRST = ("noise", "timestep_index")


class TrainingSamples(Dataset):
    """Samples by (step, position), with latents drawn from the posterior and prompts dropped.

    A sample is a dictionary of tensors, C T h w of a clip, N tokens of token_dim, R repeats:
        latents (C, T, h, w), visible (T, n), noise (R, T, N, token_dim),
        timestep_index (R, T, N), motion_flow (), fps (), and
        prompt (text_token_len, text_token_dim) with prompt_length (), or label ().

    Raises:
        InputError: the data does not fit the model.
    """

    def __init__(
        self,
        data: LatentDataset,
        config: ModelConfig,
        scheduler: SchedulerConfig,
        options: TrainingOptions,
    ):
        check_data(data, config)
        self.data, self.config = data, config
        self.scheduler, self.options = scheduler, options
        self.order = ShuffledOrder(len(data), options.seed)

    def mask_ratio(self, step: int) -> float:
        """Share of masked tokens in all samples of a step."""
        options = self.options
        return draw_mask_ratio(
            keyed_generator(options.seed, _MASK_RATIO, step),
            options.mask_ratio_mean,
            options.mask_ratio_std,
            options.mask_ratio_min,
        )

    def __getitem__(self, step_and_position: tuple[int, int]) -> dict[str, Tensor]:
        step, position = step_and_position
        options, config = self.options, self.config
        generator = keyed_generator(options.seed, _SAMPLE, position)
        sample = self.data[self.order[position]]
        latents = self.data.draw_latents(sample, generator)
        chance = torch.rand((), generator=generator, dtype=torch.float32).item()
        dropped = chance < options.prompt_dropout
        draws = draw_training_noise(
            latents[None],
            (config.num_image_tokens, config.token_dim),
            self.scheduler,
            mask_ratio=self.mask_ratio(step),
            repeats=options.loss_repeats,
            generator=generator,
        )
        frames = latents.shape[1]
        tensors = {
            "latents": latents,
            "visible": draws.visible,
            "noise": draws.noise.unflatten(0, (-1, frames)),
            "timestep_index": draws.timestep_index.unflatten(0, (-1, frames)),
            "motion_flow": torch.tensor(sample.motion_flow, dtype=torch.float32),
            "fps": torch.tensor(sample.fps, dtype=torch.float32),
        }
        if sample.text is None:
            label = NULL_CLASS if dropped else sample.label
            return {**tensors, "label": torch.tensor(label)}
        text = sample.text[:0] if dropped else sample.text
        padding = config.text_token_len - len(text)
        return {
            **tensors,
            "prompt": F.pad(text, (0, 0, 0, padding)),
            "prompt_length": torch.tensor(len(text)),
        }


def collate(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch, in the layout of `TrainingDraws` where that has one of its own."""
    batch = default_collate(samples)
    batch["visible"] = batch["visible"].flatten(0, 1)
    for name in _REPEATS_FIRST:
        # (B, R, T, ...) -> (R * B * T, ...): repeats of the whole batch, one after the other.
        batch[name] = batch[name].transpose(0, 1).flatten(0, 2)
    return batch


def check_data(data: LatentDataset, config: ModelConfig) -> None:
    """Whether a model can be trained on data.

    Raises:
        InputError: what does not fit.
        CheckpointError: a shard is damaged.
    """
    channels, frames, height, width = data.latent_shape
    if (channels, height, width) != config.latent_shape:
        raise InputError(
            f"{data.folder} has latents of {channels} x {height} x {width}, the model takes "
            f"{' x '.join(map(str, config.latent_shape))}; encode at "
            f"{config.image_size[0]} x {config.image_size[1]} pixels with the model's VAE"
        )
    if data.index.text_dim != config.text_token_dim:
        names = ["class labels" if d is None else f"text embeddings of width {d}" for d in
                 (data.index.text_dim, config.text_token_dim)]  # fmt: skip
        raise InputError(f"{data.folder} has {names[0]}, the model takes {names[1]}")
    longest = data.longest_caption()
    # Cut here, a caption would lose the end token that the tokenizer keeps when it cuts.
    if config.text_token_dim and longest > config.text_token_len:
        raise InputError(
            f"{data.folder} has captions of up to {longest} tokens, the model takes "
            f"{config.text_token_len}; encode again, into another folder, with --vae, "
            f"--text-encoder and --text-length {config.text_token_len} (TextEncoder's max_length)"
        )
    if frames > 1 and not config.is_video:
        raise InputError(f"{data.folder} has clips of {frames} latents; this is an image model")


class StepSampler(Sampler):
    """Micro-batches of (step, index) of one process, for all steps of a run that are left."""

    def __init__(self, options, first_step: int, first_position: int, rank: int, world_size: int):
        self._options = options
        self._first_step, self._first_position = first_step, first_position
        self._rank, self._world_size = rank, world_size
        # Also checks that the batch can be split.
        self.micro_batches_per_step = len(self._split(first_position))

    def _split(self, position: int) -> list[list[int]]:
        options, world_size = self._options, self._world_size
        size = options.micro_batch_size or max(options.batch_size // world_size, 1)
        return split_step(position, options.batch_size, size, self._rank, world_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        position = self._first_position
        for step in range(self._first_step, self._options.steps):
            for micro_batch in self._split(position):
                yield [(step, index) for index in micro_batch]
            position += self._options.batch_size


def load_batches(
    dataset: Dataset,
    sampler: StepSampler,
    collate: Callable[[Any], Any],
    workers: int,
    device: torch.device,
) -> Iterator[dict[str, Tensor]]:
    """A process's micro-batches, as dictionaries of tensors in memory of the CPU.

    `device` is the one they go to: for a GPU their memory is pinned.
    """
    # Elsewhere it is of no use, and would start the driver.
    pin_memory = device.type == "cuda"
    return load(dataset, workers, collate, batch_sampler=sampler, pin_memory=pin_memory)
