"""One interface over the video VAE of this package and the SD / SDXL image VAE of diffusers."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nova_kernels.autocast import without_autocast

from .altered_layers import uncompiled, weights_to_save
from .checkpoint import load_state_dict, load_strict, read_json, save_state_dict, write_json
from .errors import CheckpointError, ConfigError, InputError, dependency_error
from .noise import Generators
from .numeric import check_multiples, checked_count
from .vae import CausalVideoVAE, StreamingDecoder, VAEConfig, sample_latents

VIDEO_CLASSES = ("AutoencoderKLOpenSora", "CausalVideoVAE")
IMAGE_CLASS = "AutoencoderKL"


class LatentCodec:
    """Pixels in [-1, 1] to scaled latents, and back.

    Args:
        module: a `CausalVideoVAE`, or diffusers' `AutoencoderKL`.

    Attributes:
        module: as given, frozen and in evaluation mode.
    """

    def __init__(self, module: nn.Module):
        self.module = module.eval().requires_grad_(False)

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike,
        torch_dtype: torch.dtype | None = None,
        *,
        allow_pickle: bool = False,
    ) -> "LatentCodec":
        """Open a vae/ folder.

        Args:
            torch_dtype: of the weights, see `to`; None: the file's.
            allow_pickle: also read .bin weights, where there are no safetensors.

        Raises:
            CheckpointError: an unknown class, or weights that do not fit.
            ConfigError: a config that makes no VAE.
            DependencyError: an image VAE without diffusers.
        """
        folder = Path(folder)
        config = _read_config(folder)
        if isinstance(config, VAEConfig):
            with torch.device("meta"):
                module: nn.Module = CausalVideoVAE(config)
        else:
            module = _image_vae(config)
        weights = load_state_dict(folder, allow_pickle=allow_pickle)
        load_strict(module, _renamed(weights), str(folder))
        return cls(module).to(dtype=torch_dtype)

    def to(
        self, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> "LatentCodec":
        """Move the module to a device, a dtype, or both.

        Image VAEs whose config says `force_upcast`, as SDXL's does, get float32 where float16 is
        asked for, in which they overflow.
        """
        if dtype == torch.float16 and getattr(self.module.config, "force_upcast", False):
            dtype = torch.float32
        # Not diffusers' own method, which in 0.42 warns of every cast, though of no module.
        nn.Module.to(self.module, device=device, dtype=dtype)
        return self

    def save(self, folder: str | os.PathLike) -> None:
        """Write config.json and safetensors weights, so that `load` opens them again.

        Raises:
            CheckpointError: see `weights_to_save`; the disk is full.
        """
        weights = self.weights_to_save()
        config = self.module.config
        if self.is_video:
            # The reference's name, so that it opens the folder too.
            config = {"_class_name": VIDEO_CLASSES[0], **config.to_dict()}
        else:
            config = {"_class_name": IMAGE_CLASS, **_plain(config)}
        save_state_dict(weights, folder)
        write_json(Path(folder) / "config.json", config)

    def weights_to_save(self) -> dict[str, Tensor]:
        """The weights by the names that files have.

        Raises:
            CheckpointError: layers were wrapped, replaced or quantised.
        """
        config = self.module.config
        with torch.device("meta"):
            fresh = CausalVideoVAE(config) if self.is_video else _image_vae(config)
        return weights_to_save(self.module, fresh, "the VAE")

    @property
    def is_video(self) -> bool:
        """Whether it encodes clips; an image VAE encodes single frames."""
        return isinstance(uncompiled(self.module), CausalVideoVAE)

    @property
    def latent_channels(self) -> int:
        """Channels of a latent."""
        return self.module.config.latent_channels

    @property
    def scaling_factor(self) -> float:
        """What the VAE's own latents are multiplied by, after `shift_factor` was subtracted."""
        return self.module.config.scaling_factor

    @property
    def shift_factor(self) -> float:
        """What is subtracted from the VAE's own latents; 0 in most."""
        return self.module.config.shift_factor or 0.0

    @property
    def spatial_factor(self) -> int:
        """Pixels along a side of a latent."""
        return 2 ** (len(self.module.config.block_out_channels) - 1)

    @property
    def temporal_factor(self) -> int:
        """Pixel frames of a latent frame, after the first, which stands for one."""
        return self.module.config.temporal_factor if self.is_video else 1

    @torch.no_grad()
    def encode(
        self,
        pixels: Tensor,
        generator: Generators = None,
        *,
        sample: bool = True,
        batch_size: int = 1,
    ) -> Tensor:
        """Scaled latents.

        Args:
            pixels: as for `encode_moments`.
            generator: one, or a list of one a sample, on any device.
            sample: draw from the posterior; False gives its mean.
            batch_size: samples that go through the network at a time.

        Returns:
            (B, channels, h, w), or with the frame axis, in the module's dtype.

        Raises:
            InputError: other shapes, or a batch size below 1.
        """
        moments = [self.encode_moments(part) for part in _parts(pixels, batch_size)]
        mean, logvar = (torch.cat(parts) for parts in zip(*moments, strict=True))
        latents = sample_latents(mean, logvar, generator) if sample else mean
        return ((latents - self.shift_factor) * self.scaling_factor).to(self.module.dtype)

    @torch.no_grad()
    def encode_moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the latents, neither scaled.

        Args:
            pixels: (B, 3, H, W), or (B, 3, T, H, W) with T = 1 + 4n for a video VAE, T = 1 for an
                image VAE; values in [-1, 1].

        Returns:
            Two float32 tensors (B, channels, h, w), or with the frame axis.

        Raises:
            InputError: other shapes.
        """
        encode = self.module.encode_moments if self.is_video else self._image_moments
        with without_autocast(self.module.device):
            return encode(pixels)

    @torch.no_grad()
    def decode(self, latents: Tensor, batch_size: int = 1) -> Tensor:
        """Pixels of scaled latents.

        Args:
            latents: (B, channels, h, w), or (B, channels, T, h, w), T = 1 for an image VAE.
            batch_size: samples that go through the network at a time.

        Returns:
            float32 (B, 3, H, W), or (B, 3, frames, H, W); nominally in [-1, 1], not clamped.

        Raises:
            InputError: other shapes, or a batch size below 1.
        """
        decode = self.module.decode if self.is_video else self._decode_images
        with without_autocast(self.module.device):
            return torch.cat([decode(part).float() for part in _parts(latents, batch_size)])

    def stream(self) -> StreamingDecoder:
        """Decodes latents (B, channels, n, h, w) as they come; see `StreamingDecoder`.

        An image VAE, which has no time, decodes every latent frame by itself.
        """
        return StreamingDecoder(
            self.decode,
            tile_latents=self.module.tile_latents if self.is_video else 1,
            overlap=1 if self.is_video else 0,
            first_frame_alone=self.is_video and self.module.first_frame_alone,
            in_channels=self.latent_channels,
            no_pixels=self._no_pixels,
        )

    def _no_pixels(self, latents: Tensor) -> Tensor:
        batch, _, _, height, width = latents.shape
        factor, channels = self.spatial_factor, self.module.config.out_channels
        shape = (batch, channels, 0, height * factor, width * factor)
        return torch.empty(shape, dtype=torch.float32, device=self.module.device)

    def _image_moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        images = _as_images(pixels, self.module.config.in_channels, "pixels")
        check_multiples(*images.shape[2:], self.spatial_factor)  # The network would crop them.
        images = images.to(self.module.device, self.module.dtype)
        posterior = self.module.encode(images).latent_dist
        return tuple(_like(pixels, x.float()) for x in (posterior.mean, posterior.logvar))

    def _decode_images(self, latents: Tensor) -> Tensor:
        images = _as_images(latents, self.latent_channels, "latents")
        images = images / self.scaling_factor + self.shift_factor
        images = self.module.decode(images.to(self.module.device, self.module.dtype)).sample
        return _like(latents, images)


def read_temporal_factor(folder: Path) -> int:
    """`LatentCodec.temporal_factor` of a vae/ folder, from its config alone.

    Raises:
        CheckpointError, ConfigError: see `LatentCodec.load`.
    """
    config = _read_config(folder)
    return config.temporal_factor if isinstance(config, VAEConfig) else 1


def _read_config(folder: Path) -> VAEConfig | dict[str, Any]:
    """The config of a vae/ folder: of a video VAE, or as diffusers wrote that of an image VAE."""
    config = read_json(folder / "config.json")
    name = config.get("_class_name")
    if name in VIDEO_CLASSES:
        return VAEConfig.from_dict(config)
    if name == IMAGE_CLASS:
        return config
    raise CheckpointError(
        f"{folder / 'config.json'} names the class {name!r}; known are "
        f"{', '.join((*VIDEO_CLASSES, IMAGE_CLASS))}"
    )


def to_pixels(clips: Sequence[np.ndarray]) -> Tensor:
    """Clips uint8 (T, H, W, 3) of equal shape -> float32 (B, 3, T, H, W) in [-1, 1]."""
    frames = torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3)
    return (frames.float() - 127.5) / 127.5


def _parts(x: Tensor, batch_size: int) -> tuple[Tensor, ...]:
    return x.split(checked_count("batch_size", batch_size, least=1))


def _as_images(x: Tensor, channels: int, name: str) -> Tensor:
    """(B, channels, h, w) of x, which may have a frame axis of length 1."""
    images = x[:, :, 0] if x.dim() == 5 and x.shape[2] == 1 else x
    if images.dim() != 4 or images.shape[1] != channels or 0 in images.shape:
        raise InputError(
            f"an image VAE takes {name} of one frame, (batch, {channels}, height, width), got "
            f"shape {tuple(x.shape)}"
        )
    return images


def _like(given: Tensor, images: Tensor) -> Tensor:
    """Images with a frame axis if `given` has one."""
    return images[:, :, None] if given.dim() == 5 else images


def _image_vae(config: Mapping[str, Any]) -> nn.Module:
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        need = "the SD / SDXL VAE of this checkpoint needs diffusers"
        raise dependency_error(need, "diffusers", "pip install diffusers", error) from error
    try:
        return AutoencoderKL.from_config(config)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"diffusers cannot build the VAE of this config: {error}") from error


def _renamed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of attention weights before diffusers 0.18, as SD's VAE files still have them."""
    names = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    renamed = {}
    for key, tensor in weights.items():
        if ".attentions." in key:
            for old, new in names.items():
                key = key.replace(f".{old}.", f".{new}.")
            if ".to_" in key and key.endswith("weight") and tensor.dim() == 4:
                tensor = tensor[:, :, 0, 0]  # once a 1x1 convolution
        renamed[key] = tensor
    return renamed


def _plain(config: Any) -> dict[str, Any]:
    """diffusers' frozen config as a dictionary for JSON."""
    return {key: value for key, value in dict(config).items() if not key.startswith("_")}
