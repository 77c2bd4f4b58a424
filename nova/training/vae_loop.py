"""Training a causal video VAE on clips: reconstruction, edges, a little KL divergence."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, default_collate

from ..checkpoint import load_strict
from ..codec import LatentCodec, to_pixels
from ..data import ClipSource, ShuffledOrder
from ..data.seeds import keyed_generator
from ..errors import InputError, NovaError
from ..media import compare_clips, to_uint8, write_image
from ..numeric import check_multiples
from ..vae import CausalVideoVAE, VAEConfig
from .engine import Engine, make_accelerator
from .options import VAETrainingOptions
from .parameters import check_trainable
from .run import OnStep, Weights, find_resumed, read_position, run_steps, training_run
from .samples import StepSampler, load_batches
from .state import load_averaged_weights, load_training_state

_NOISE, _CROP = 4, 5  # purposes of generators, beside those of other draws
_CROPS_LOOKED_AT = 4
_UNREADABLE_IN_A_ROW = 100
# A run goes on exactly under the same values of these.
_FIXED = ("seed", "optimizer")


@training_run(less_memory="a smaller crop")
def train_vae(
    vae: CausalVideoVAE,
    source: ClipSource,
    options: VAETrainingOptions,
    on_step: OnStep | None = None,
) -> Path:
    """Train, and write checkpoints whose vae/ folder `LatentCodec.load` opens.

    The scaling factor in it is one over the standard deviation of latents of the source, so that
    scaled latents have the deviation 1 that a diffusion model expects; with a frozen encoder it
    stays as it is.

    Args:
        vae: float32, what to start from; trained in place. A resumed run puts the weights of its
            checkpoint into it. Parts may be wrapped by torch.compile.
        source: clips of one size; unreadable ones are passed over.
        options: see `VAETrainingOptions`.
        on_step: called after every step with the number of steps done and its metrics.

    Returns:
        The last checkpoint's folder.

    Raises:
        InputError: the VAE is not float32, the clips do not fit it, the batch cannot be split, or
            `out` has checkpoints already and `resume` was not asked for, or the resumed run was
            not of a VAE, or had another seed or optimizer.
        CheckpointError: the VAE has adapters or quantised layers, for which checkpoints have no
            place; files of the resumed run are missing or damaged.
        DivergenceError: the loss is not finite, or far beyond what it was; checkpoints stay.
        DeviceError: memory is short, or a process that reads clips was lost; checkpoints stay.
        DependencyError: accelerate is not installed.
        MediaError: `out` cannot be made, or not be written into.
    """
    check_trainable(vae, _empty_vae(vae.config), "the VAE to train")
    accelerator = make_accelerator(options)
    clips = ClipSamples(source, vae.config, options.seed, options.crop)
    resumed = find_resumed(options, _FIXED)
    if resumed is not None:
        load_averaged_weights(vae, _empty_vae(vae.config), resumed / "vae")
    vae.train().requires_grad_(True)
    if options.freeze_encoder:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    engine = Engine(accelerator, VAEObjective(vae, options), options)
    if resumed is not None:
        load_training_state(engine, resumed)
    rank, world_size = accelerator.process_index, accelerator.num_processes
    sampler = StepSampler(options, *read_position(resumed), rank, world_size)
    batches = load_batches(clips, sampler, default_collate, options.workers, accelerator.device)
    task = VAETask(clips, vae.config, options)
    per_step = sampler.micro_batches_per_step
    return run_steps(engine, task, batches, per_step, options, resumed, on_step)


class VAEObjective(nn.Module):
    """A VAE with its objective, as a module whose forward pass gives the losses."""

    def __init__(self, vae: CausalVideoVAE, options: VAETrainingOptions):
        super().__init__()
        self.vae = vae
        self.weights = {
            "mse": options.mse_weight,
            "edge": options.edge_weight,
            "kl": options.kl_weight,
        }

    def forward(self, pixels: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Losses of a batch.

        Args:
            pixels: (B, 3, T, H, W) in [-1, 1].
            noise: (B, C, t, h, w) normal, for the draw from the posterior.

        Returns:
            Scalars: loss, its parts l1, mse, edge and kl (unweighted), and psnr in dB, the
            mean over clips.
        """
        mean, logvar = self.vae.encode_moments(pixels)
        output = self.vae.decode_unscaled(mean + (0.5 * logvar).exp() * noise).float()
        parts = {
            "l1": F.l1_loss(output, pixels),
            "mse": F.mse_loss(output, pixels),
            "edge": edge_loss(output, pixels),
            "kl": 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum() / pixels.numel(),
        }
        loss = parts["l1"] + sum(weight * parts[name] for name, weight in self.weights.items())
        shown = (output.detach().clamp(-1, 1) - pixels).square().flatten(1).mean(dim=1)
        # The mean over clips, which does not depend on the micro-batches that they come in.
        psnr = (10 * torch.log10(4 / shown.clamp(min=1e-10))).mean()
        return {"loss": loss, **parts, "psnr": psnr}


def edge_loss(output: Tensor, target: Tensor) -> Tensor:
    """Mean distance of the differences between neighbours in height and width.

    Args:
        output, target: (..., H, W).
    """
    error = output - target
    return error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()


class ClipSamples(Dataset):
    """Clips by (step, position) as pixels (3, T, H, W) with noise (C, t, h, w).

    Args:
        crop: side of the squares that are cut out of the clips; None: whole frames.

    Raises:
        InputError: clips or crops of a size that the VAE does not take.
    """

    def __init__(self, source: ClipSource, config: VAEConfig, seed: int, crop: int | None = None):
        wanted, factor = source.format, config.spatial_factor
        check_multiples(wanted.height, wanted.width, factor)
        if crop is not None and (crop % factor or crop > min(wanted.height, wanted.width)):
            raise InputError(
                f"crop must be a multiple of {factor} for this VAE, and at most the clips' "
                f"{wanted.height} x {wanted.width}; got {crop}"
            )
        self.source, self._seed, self._crop = source, seed, crop
        self._latent_shape = (
            config.latent_channels,
            1 + (wanted.num_frames - 1) // config.temporal_factor,
            (crop or wanted.height) // factor,
            (crop or wanted.width) // factor,
        )
        self._order = ShuffledOrder(len(source), seed)

    def __getitem__(self, step_and_position: tuple[int, int]) -> dict[str, Tensor]:
        _, position = step_and_position
        generator = keyed_generator(self._seed, _NOISE, position)
        noise = torch.randn(self._latent_shape, generator=generator, dtype=torch.float32)
        pixels = self._pixels(position)
        if self._crop is not None:
            pixels = detailed_crop(pixels, self._crop, keyed_generator(self._seed, _CROP, position))
        return {"pixels": pixels, "noise": noise}

    def first(self, count: int) -> Iterator[Tensor]:
        """Pixels (3, T, H, W) of the first clips in shuffled order, at most so many."""
        return (self._pixels(k) for k in range(min(count, len(self.source))))

    def _pixels(self, position: int) -> Tensor:
        # The next readable clip takes the place of one that is not, the same on every run.
        for later in range(_UNREADABLE_IN_A_ROW):
            try:
                clip = self.source[self._order[position + later]]
            except NovaError as error:
                # Without an optional library nothing can be read.
                if isinstance(error, ImportError):
                    raise
                problem = error
            else:
                return to_pixels([clip.frames])[0]
        raise InputError(
            f"{_UNREADABLE_IN_A_ROW} clips in a row cannot be read, the last one because: {problem}"
        )


def detailed_crop(pixels: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """Of a few random crops the one with the most contrast, since plain ground teaches little.

    Args:
        pixels: (3, T, H, W).

    Returns:
        (3, T, side, side).
    """
    room = torch.tensor(pixels.shape[2:]) - side + 1
    corners = (torch.rand(_CROPS_LOOKED_AT, 2, generator=generator) * room).long().tolist()
    crops = [pixels[:, :, top : top + side, left : left + side] for top, left in corners]
    return max(crops, key=lambda crop: float(crop.std())).contiguous()


class VAETask:
    """Checkpoints with a vae/ folder, sheets of originals and reconstructions. See `run.Task`."""

    def __init__(self, clips: ClipSamples, config: VAEConfig, options: VAETrainingOptions):
        self._clips, self._config, self._options = clips, config, options

    def metrics(self, step: int) -> dict[str, float]:
        return {}

    def save(self, folder: Path, weights: Weights, device: torch.device) -> None:
        codec = self._codec(weights, device)
        if not self._options.freeze_encoder:
            factor = scaling_factor(codec, self._clips.first(self._options.scale_clips))
            codec.module.config = replace(self._config, scaling_factor=factor)
        codec.save(folder / "vae")

    def write_sheet(self, path: Path, weights: Weights, device: torch.device) -> None:
        codec = self._codec(weights, device)
        pixels = torch.stack(list(self._clips.first(self._options.num_samples)))
        decoded = codec.decode(codec.encode(pixels, sample=False))
        rows, captions = [], []
        for original, copy in zip(to_uint8(pixels), to_uint8(decoded), strict=True):
            rows += [original, copy]
            captions += ["original", "through the VAE"]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_image(path, compare_clips(rows, captions=captions))

    def _codec(self, weights: Weights, device: torch.device) -> LatentCodec:
        vae = _empty_vae(self._config)
        # The objective's parameters are the VAE's behind a prefix.
        renamed = {name.removeprefix("vae."): tensor for name, tensor in weights.items()}
        load_strict(vae, renamed, "the training")
        return LatentCodec(vae.to(device))


def _empty_vae(config: VAEConfig) -> CausalVideoVAE:
    with torch.device("meta"):
        return CausalVideoVAE(config)


@torch.no_grad()
def scaling_factor(codec: LatentCodec, clips: Iterable[Tensor]) -> float:
    """One over the standard deviation of the latents of clips, each (3, T, H, W)."""
    latents = [codec.module.encode_moments(clip[None])[0].cpu() for clip in clips]
    return 1.0 / max(float(torch.cat(latents).std()), 1e-6)
