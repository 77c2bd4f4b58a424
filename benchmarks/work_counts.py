"""What sampling and decoding a video take: operations and bytes, counted from the geometry.

Operations are those of matrix products, attention and convolutions, a multiplication and an
addition as two; everything else is memory traffic that fusing can hide. What is counted is
`nova/sampling.py`, with all that it saves. `tests/test_work_counts.py` holds the numbers against
torch's own counter.

Bytes are what a stage reads from memory if no weight stays in a cache from one set to the next and
no activation ever leaves the chip: its weights once a set or frame, and the video encoder's earlier
keys and values.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from nova.config import EncoderConfig, ModelConfig
from nova.guidance import Guidance
from nova.schedule import DiffusionSchedule
from nova.vae import CausalVideoVAE, VAEConfig
from nova.vae.tiles import time_tiles

# Parts of a video's time, in their order. REST is noise, token embeddings, and the host.
VIDEO_ENCODER, IMAGE_ENCODER, DENOISE, REST = "video encoder", "image encoder", "denoise", "rest"
TEXT, VAE = "text", "VAE"
# Features of a timestep or a frame's time, before their projection.
TIME_FEATURES = 256


@dataclass(frozen=True)
class Work:
    """Operations, and bytes read from memory."""

    operations: int = 0
    bytes: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.operations + other.operations, self.bytes + other.bytes)


def total(work: Iterable[Work]) -> Work:
    """The sum."""
    return sum(work, Work())


def sampling_work(
    config: ModelConfig,
    *,
    batch: int,
    num_frames: int,
    set_sizes: Sequence[int],
    schedule: DiffusionSchedule,
    guidance: Guidance,
    dtype: torch.dtype,
) -> dict[str, Work]:
    """Work of `generate_frames` by stage, without given frames or a sliding window.

    Args:
        batch: videos. num_frames: latent frames. set_sizes: of every frame, see
            `nova.schedule.set_sizes`.
        dtype: of weights and caches; operations do not depend on it.

    Returns:
        Stages VIDEO_ENCODER, IMAGE_ENCODER, DENOISE, REST.
    """
    rows = batch * guidance.passes
    head = config.image_decoder.embed_dim
    embedded = num_frames * batch * sum(set_sizes)
    timesteps = len(schedule) * (TIME_FEATURES + head)
    return {
        VIDEO_ENCODER: _video_encoder(config, batch, rows, num_frames, dtype),
        IMAGE_ENCODER: _image_encoder(config, rows, num_frames, set_sizes, dtype),
        DENOISE: _denoise(config, batch, num_frames, set_sizes, schedule, guidance, dtype),
        REST: Work(
            2 * embedded * config.token_dim * config.image_encoder.embed_dim + 2 * timesteps * head
        ),
    }


def vae_work(
    config: VAEConfig, latent_shape: tuple[int, int, int], batch: int, dtype: torch.dtype
) -> Work:
    """Work of decoding videos, counted by running the decoder on tensors without memory.

    Args:
        latent_shape: (frames, height, width) of the latents.
    """
    operations, values = _decoding(config, latent_shape)
    return Work(batch * operations, batch * values * dtype.itemsize)


@cache
def _decoding(config: VAEConfig, latent_shape: tuple[int, int, int]) -> tuple[int, int]:
    """Operations of decoding a video, and weights that are read: all of them for every tile."""
    with torch.device("meta"), torch.no_grad():
        vae = CausalVideoVAE(config, memory_budget=None)
        latents = torch.empty(1, config.latent_channels, *latent_shape)
        operations = counted_operations(lambda: vae.decode(latents))
    weights = sum(p.numel() for p in vae.decoder.parameters())
    return operations, weights * len(list(time_tiles(latent_shape[0], vae.tile_latents)))


def counted_operations(call: Callable[[], Any]) -> int:
    """Operations of a call as torch counts them: of its own ops, not inside kernels.

    The call must run on CPU or "meta" tensors.
    """
    # It brings Triton along, which would count as memory wherever only the counts are needed.
    from torch.utils.flop_counter import FlopCounterMode

    # Torch has no formula for the CPU's own attention kernel; plain products it knows.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        call()
    return counter.get_total_flops()


def encoder_weights(encoder: EncoderConfig) -> int:
    """Parameters of an encoder's blocks: products and their biases, two norms each."""
    width = encoder.embed_dim
    return encoder.depth * (12 * width**2 + 13 * width)


def _attended(width: int, queries: int, keys: int) -> int:
    """Operations of attention itself: two products over all pairs."""
    return 4 * queries * keys * width


def _block(width: int, tokens: int, keys: int) -> int:
    """Operations of a block on `tokens` that see `keys`: qkv, attention, projection, MLP."""
    return 24 * tokens * width**2 + _attended(width, tokens, keys)


def _video_encoder(
    config: ModelConfig, batch: int, rows: int, num_frames: int, dtype: torch.dtype
) -> Work:
    encoder, tokens = config.video_encoder, config.num_frame_tokens
    width, later = encoder.embed_dim, num_frames - 1
    prefix = (config.text_token_len or 1) + (2 if config.is_video else 0)
    blocks = _block(width, prefix + tokens, prefix + tokens)
    seen = 0  # keys and values that are read, of earlier frames
    for frame in range(1, num_frames):
        blocks += _block(width, tokens, prefix + tokens * (frame + 1))
        seen += 2 * (prefix + tokens * frame) * width
    operations = rows * encoder.depth * blocks
    # Latents are embedded once for all passes, in patches of twice the image encoder's side.
    operations += 2 * later * batch * tokens * 4 * config.token_dim * width
    operations += 2 * later * rows * tokens * _mixer_weights(config)
    if not config.rotary_pos_embed:
        operations += 2 * num_frames * (TIME_FEATURES + width) * width
    values = num_frames * encoder_weights(encoder) + rows * encoder.depth * seen
    return Work(operations, (values + later * _mixer_weights(config)) * dtype.itemsize)


def _mixer_weights(config: ModelConfig) -> int:
    rank, width = config.video_mixer_rank, config.video_encoder.embed_dim
    if not rank:
        return 0
    return 3 * rank * width if rank > 0 else 2 * width**2


def _image_encoder(
    config: ModelConfig, rows: int, num_frames: int, set_sizes: Sequence[int], dtype: torch.dtype
) -> Work:
    encoder = config.image_encoder
    width, half = encoder.embed_dim, encoder.depth // 2
    condition = config.num_frame_tokens
    whole = condition + config.num_image_tokens
    operations = start = 0
    for size in set_sizes:
        seen = condition + start
        operations += half * _block(width, seen, seen)
        operations += (encoder.depth - half - 1) * _block(width, whole, whole)
        # The last block: keys and values of all tokens, the rest for the set's alone.
        operations += 4 * whole * width**2 + 20 * size * width**2 + _attended(width, size, whole)
        start += size
    weights = num_frames * len(set_sizes) * encoder_weights(encoder)
    return Work(rows * num_frames * operations, weights * dtype.itemsize)


def _denoise(
    config: ModelConfig,
    batch: int,
    num_frames: int,
    set_sizes: Sequence[int],
    schedule: DiffusionSchedule,
    guidance: Guidance,
    dtype: torch.dtype,
) -> Work:
    head, token_dim = config.image_decoder, config.token_dim
    width = head.embed_dim
    projector = (config.image_encoder.embed_dim + width) * width
    modulation = (3 * head.depth + 2) * width**2
    layers = 2 * head.depth * width**2 + token_dim * width
    guided = guidance.guided_steps(schedule.timesteps)
    # Over all steps: passes of a token. Its embedding is shared by the passes.
    token_passes = guided * guidance.passes + (len(schedule) - guided)
    a_token = 2 * (
        guidance.passes * projector
        + token_passes * (modulation + layers)
        + len(schedule) * token_dim * width
    )
    # The loop's weights fit the L2 cache, or all multiprocessors together: once a set.
    weights = projector + modulation + layers + token_dim * width
    return Work(
        a_token * batch * num_frames * sum(set_sizes),
        weights * num_frames * len(set_sizes) * dtype.itemsize,
    )
