"""The causal video VAE: pixels to latents and back, tile by tile in time, streaming."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from nova_kernels.out_of_memory import is_out_of_gpu_memory

from ..altered_layers import is_altered
from ..errors import InputError
from ..noise import Generators, NoiseSource
from ..numeric import check_multiples, checked_count, is_finite_number
from .config import VAEConfig
from .framewise import decode_framewise, encode_framewise
from .layers import Decoder, Encoder
from .stream import StreamingDecoder
from .tiles import SpatialTiling, blend_tiles, time_tiles

# Enough for the released model to keep all it can within 8 GB at 33 x 480 x 768 in float32,
# weights and libraries included.
CPU_MEMORY_BUDGET = 6_000_000_000
AUTO = "auto"
LOGVAR_RANGE = (-30.0, 20.0)


class CausalVideoVAE(nn.Module):
    """Open-Sora-Plan's video autoencoder: 1 + 4n frames of 8h x 8w are 1 + n latents of h x w.

    Videos are (B, 3, T, H, W) with values in [-1, 1], latents (B, C, t, h, w); images and their
    latents are the same without the third axis. Inputs are moved to the module's device and dtype.

    Time is cut into tiles that overlap by one latent, because GroupNorm sees a whole tile:
    `tile_latents` is part of the result, and 5 is what the released model was trained for. So is
    `first_frame_alone`.

    Without gradients, a tile whose plain forward pass would take more than `memory_budget` bytes
    is computed frame by frame instead (see `framewise`), with the same result to rounding; not so
    where a layer has hooks or a replaced `forward`, which only the plain pass runs.

    Args:
        config: geometry.
        tile_latents: latent frames of a tile, at least 2.
        memory_budget: bytes that hidden tensors may take; "auto": 6 GB on a CPU, most of the free
            memory on a GPU; None: no limit. It is a goal: a few frames of every layer must fit in
            any case, and weights are not counted.
        first_frame_alone: decode the first latent frame by itself, as that of an image, so that a
            stream gives its frame at once; the first tile comes behind it, without that frame.

    Raises:
        InputError: `tile_latents` below 2, or a `memory_budget` that is none of these.
    """

    def __init__(
        self,
        config: VAEConfig,
        tile_latents: int = 5,
        memory_budget: float | str | None = AUTO,
        *,
        first_frame_alone: bool = False,
    ):
        super().__init__()
        self.config = config
        self.tile_latents = tile_latents
        self.first_frame_alone = first_frame_alone
        self.memory_budget = memory_budget
        self.tiling: SpatialTiling | None = None
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        # The 1x1 convolutions around the latents have the kind of the decoder's.
        conv, channels = type(self.decoder.conv_in), config.latent_channels
        self.quant_conv = (
            conv(2 * channels, 2 * channels, 1) if config.use_quant_conv else nn.Identity()
        )
        self.post_quant_conv = (
            conv(channels, channels, 1) if config.use_post_quant_conv else nn.Identity()
        )

    @property
    def tile_latents(self) -> int:
        """Latent frames of a tile of time; may be set, to 2 or more."""
        return self._tile_latents

    @tile_latents.setter
    def tile_latents(self, value: int) -> None:
        # Tiles overlap by one: those of one latent would never advance.
        self._tile_latents = checked_count("tile_latents", value, least=2)

    @property
    def memory_budget(self) -> float | str | None:
        """Bytes that hidden tensors may take, "auto", or None; may be set."""
        return self._memory_budget

    @memory_budget.setter
    def memory_budget(self, value: float | str | None) -> None:
        if value is not None and value != AUTO and not is_finite_number(value):
            raise InputError(f'memory_budget must be bytes, "auto" or None, got {value!r}')
        self._memory_budget = value

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.conv_in.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.decoder.conv_in.weight.device

    def scale(self, latents: Tensor) -> Tensor:
        """The VAE's own latents to the ones that a model is trained on."""
        return (latents - (self.config.shift_factor or 0.0)) * self.config.scaling_factor

    def unscale(self, latents: Tensor) -> Tensor:
        """The inverse of `scale`."""
        return latents / self.config.scaling_factor + (self.config.shift_factor or 0.0)

    def enable_tiling(
        self, tile_size: int | tuple[int, int] = 256, overlap: int | tuple[int, int] = 64
    ) -> None:
        """Cut frames into overlapping tiles, blended linearly, for the least memory.

        An approximation: GroupNorm and attention then see a tile in place of the whole frame, so
        brightness and texture may differ from tile to tile, the more the smaller the tiles. Frames
        of up to one tile are unaffected.

        Args:
            tile_size, overlap: pixels, one number or (height, width), multiples of 8.

        Raises:
            InputError: sizes that are no multiples, or an overlap of more than half a tile.
        """
        self.tiling = SpatialTiling.from_pixels(tile_size, overlap, self.config.spatial_factor)

    def disable_tiling(self) -> None:
        """Whole frames again: the exact result."""
        self.tiling = None

    def encode_moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the latents, neither scaled.

        Args:
            pixels: (B, 3, T, H, W) with T = 1 + 4n, or (B, 3, H, W); H and W multiples of 8.

        Returns:
            Two float32 tensors (B, C, 1 + n, H / 8, W / 8), or without the third axis for images.
            The log-variance is clamped to [-30, 20].

        Raises:
            InputError: other shapes; the message names the nearest lengths that are possible.
        """
        video = self._as_video(pixels, self.config.in_channels, "pixels")
        self._check_pixels(video)
        tile_frames = 1 + self.config.temporal_factor * (self.tile_latents - 1)
        tiles = []
        for start, stop in time_tiles(video.shape[2], tile_frames):
            features = self._encode_tile(video[:, :, start:stop])
            tiles.append(features if start == 0 else features[:, :, 1:])
        moments = torch.cat(tiles, dim=2).float()
        mean, logvar = (moments if pixels.dim() == 5 else moments[:, :, 0]).chunk(2, dim=1)
        return mean, logvar.clamp(*LOGVAR_RANGE)

    def encode(self, pixels: Tensor, generator: Generators = None, sample: bool = True) -> Tensor:
        """Latents of a video or an image, scaled.

        Args:
            pixels: as for `encode_moments`.
            generator: for the noise, one or a list of one per sample, on any device.
            sample: draw from the posterior; False gives its mean.

        Returns:
            (B, C, 1 + n, H / 8, W / 8), or without the third axis, in the module's dtype.
        """
        mean, logvar = self.encode_moments(pixels)
        latents = sample_latents(mean, logvar, generator) if sample else mean
        return self.scale(latents).to(self.dtype)

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels of scaled latents.

        Args:
            latents: (B, C, t, h, w), any t, or (B, C, h, w).

        Returns:
            (B, 3, 1 + 4 (t - 1), 8h, 8w) or (B, 3, 8h, 8w), in the module's dtype; nominally
            in [-1, 1], not clamped.

        Raises:
            InputError: other shapes.
        """
        return self.decode_unscaled(self.unscale(latents))

    def decode_unscaled(self, latents: Tensor) -> Tensor:
        """`decode` for the VAE's own latents, such as the mean that `encode_moments` gives."""
        video = self._as_video(latents, self.config.latent_channels, "latents")
        stream = self._stream(self._decode_tile)
        pixels = torch.cat([stream.push(video), stream.finish()], dim=2)
        return pixels if latents.dim() == 5 else pixels[:, :, 0]

    def stream(self) -> StreamingDecoder:
        """Decode scaled latents as they come: the same pixels as `decode`, tile after tile."""
        return self._stream(lambda tile: self._decode_tile(self.unscale(tile)))

    def _stream(self, decode_tile: Callable[[Tensor], Tensor]) -> StreamingDecoder:
        return StreamingDecoder(
            decode_tile,
            self.tile_latents,
            first_frame_alone=self.first_frame_alone,
            in_channels=self.config.latent_channels,
            no_pixels=self._no_pixels,
        )

    def _no_pixels(self, latents: Tensor) -> Tensor:
        """Pixels (B, 3, 0, H, W) of no frame, for latents (B, C, t, h, w)."""
        batch, _, _, height, width = latents.shape
        factor = self.config.spatial_factor
        shape = (batch, self.config.out_channels, 0, height * factor, width * factor)
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def _encode_tile(self, pixels: Tensor) -> Tensor:
        pixels = pixels.to(self.device, self.dtype)
        factor = self.config.spatial_factor
        height, width = pixels.shape[3] // factor, pixels.shape[4] // factor
        if self.tiling is None or self.tiling.covers(height, width):
            return self._encode_frames(pixels)
        return blend_tiles(pixels, self._encode_frames, self.tiling, factor, 1)

    def _encode_frames(self, pixels: Tensor) -> Tensor:
        largest = pixels[:, 0].numel() * self.config.block_out_channels[0]

        def encode(budget: float) -> Tensor:
            if self._is_framewise(self.encoder, largest, budget):
                return encode_framewise(self.encoder, pixels)
            return self.encoder(pixels)

        return self.quant_conv(self._in_budget(encode))

    def _decode_tile(self, latents: Tensor) -> Tensor:
        latents = latents.to(self.device, self.dtype)
        if self.tiling is None or self.tiling.covers(*latents.shape[3:]):
            return self._decode_frames(latents)
        return blend_tiles(latents, self._decode_frames, self.tiling, 1, self.config.spatial_factor)

    def _decode_frames(self, latents: Tensor) -> Tensor:
        config, (batch, _, length, height, width) = self.config, latents.shape
        frames = 1 + config.temporal_factor * (length - 1)
        pixels = batch * frames * height * width * config.spatial_factor**2
        latents = self.post_quant_conv(latents)
        # The last upsampler gives the channels of the level before.
        largest = pixels * max(config.block_out_channels[:2])

        def decode(budget: float) -> Tensor:
            if self._is_framewise(self.decoder, largest, budget):
                return decode_framewise(self.decoder, latents, budget)
            return self.decoder(latents)

        return self._in_budget(decode)

    def _in_budget(self, compute: Callable[[float], Tensor]) -> Tensor:
        """Compute within the budget; where a GPU's memory ends all the same, again in the least."""
        budget = self._budget()
        try:
            return compute(budget)
        except RuntimeError as error:
            # CUDA graphs, for one, keep memory that torch counts as unused.
            if (
                not is_out_of_gpu_memory(error)
                or self.memory_budget != AUTO
                or torch.is_grad_enabled()
            ):
                raise
        return compute(0)

    def _is_framewise(self, part: nn.Module, largest: int, budget: float) -> bool:
        """Whether to compute a part frame by frame.

        Its plain pass takes about four copies of its largest tensor, of `largest` elements. Where
        that is more than `budget`, only altered layers, which nothing else runs, keep it.
        """
        plain_bytes = 4 * largest * self.dtype.itemsize
        # Frame by frame, layers are not called themselves.
        return plain_bytes > budget and not any(map(is_altered, part.modules()))

    def _budget(self) -> float:
        """Bytes that hidden tensors may take now."""
        if torch.is_grad_enabled() or self.memory_budget is None:
            return math.inf
        if self.memory_budget != AUTO:
            return self.memory_budget
        if self.device.type != "cuda":
            return CPU_MEMORY_BUDGET
        free, _ = torch.cuda.mem_get_info(self.device)
        # What torch holds without using it is free too; a tenth is left for fragments.
        held = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return 0.9 * (free + held)

    def _check_pixels(self, video: Tensor) -> None:
        frames, height, width = video.shape[2:]
        check_multiples(height, width, self.config.spatial_factor)
        steps = self.config.temporal_factor
        if (frames - 1) % steps:
            # Anything else would silently lose the last frames.
            fewer = 1 + (frames - 1) // steps * steps
            raise InputError(
                f"{frames} frames do not fit the VAE, which takes 1 + {steps} n: cut the video to "
                f"{fewer} or repeat frames up to {fewer + steps}"
            )

    @staticmethod
    def _as_video(x: Tensor, channels: int, name: str) -> Tensor:
        if x.dim() not in (4, 5) or x.shape[1] != channels or 0 in x.shape:
            raise InputError(
                f"{name} have shape {tuple(x.shape)}; expected (batch, {channels}, frames, height, "
                f"width) or (batch, {channels}, height, width)"
            )
        return x if x.dim() == 5 else x.unsqueeze(2)


def sample_latents(mean: Tensor, logvar: Tensor, generator: Generators = None) -> Tensor:
    """Draw from the normal distributions of `mean` and `logvar`, in their dtype.

    Args:
        generator: one, or a list of one per sample, on any device.
    """
    noise = NoiseSource(generator, mean.shape[0], dtype=mean.dtype, device=mean.device)
    return mean + (0.5 * logvar).exp() * noise.normal(*mean.shape[1:])
