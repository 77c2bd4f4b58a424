"""The VAE that fps.py decodes with: a checkpoint's, or a geometry's with random weights."""

import statistics
from pathlib import Path

import torch
from measure import timed
from torch import Tensor

from nova.codec import LatentCodec
from nova.errors import DependencyError
from nova.vae import CausalVideoVAE, VAEConfig

VIDEO_VAES = {"osp": VAEConfig.osp, "tiny": VAEConfig.tiny}
IMAGE_VAE = "sd"  # of Stable Diffusion; SDXL's has the same layers


def make_vae(
    name: str, device: torch.device, dtype: torch.dtype, checkpoint: Path | None = None
) -> LatentCodec:
    """A VAE on a device.

    Args:
        name: of `VIDEO_VAES`, or `IMAGE_VAE`; weights are random.
        checkpoint: open this folder's VAE instead.

    Raises:
        DependencyError: an image VAE without diffusers.
    """
    if checkpoint is not None:
        codec = LatentCodec.load(checkpoint / "vae", dtype)
        codec.module.to(device)
        return codec
    torch.manual_seed(0)
    module = _image_vae() if name == IMAGE_VAE else CausalVideoVAE(VIDEO_VAES[name]())
    return LatentCodec(module.to(device, dtype))


def decode_seconds(
    codec: LatentCodec, latents: Tensor, device: torch.device, repeats: int
) -> float:
    """Median seconds to decode (batch, channels, frames, h, w), one video at a time like pipelines.

    The first decoding warms up and does not count.
    """
    times = [timed(lambda: codec.decode(latents), device)[1] for _ in range(repeats + 1)]
    return statistics.median(times[1:])


def _image_vae() -> torch.nn.Module:
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise DependencyError(
            "decoding images needs diffusers: pip install diffusers, or say --no-vae"
        ) from error
    levels = 4
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=2,
        latent_channels=4,
    )
