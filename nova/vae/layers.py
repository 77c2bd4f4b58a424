"""Layers, encoder and decoder of the causal video VAE: the plain forward pass.

The architecture is that of Open-Sora-Plan's causal VAE, which extends the image VAE of latent
diffusion (arXiv 2112.10752) to video. Every tensor is (batch, channels, frames, height, width).
Convolutions in time are causal: a frame sees itself and earlier frames only. GroupNorm runs over
all frames that are passed at once, so results depend on how a video is cut into tiles of time.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nova_kernels import onednn
from nova_kernels.dispatch import requested

from .config import VAEConfig, is_causal

NORM_EPS = 1e-6


class CausalConv3d(nn.Conv3d):
    """3D convolution, zero-padded in space and, by copies of the first frame, in front in time."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size, stride=1, padding=0):
        kernel = (kernel_size,) * 3 if isinstance(kernel_size, int) else kernel_size
        # A side of one needs no padding.
        spatial = [padding if size > 1 else 0 for size in kernel[1:]]
        super().__init__(in_channels, out_channels, kernel, stride, (0, *spatial))

    def forward(self, x: Tensor) -> Tensor:
        history = self.kernel_size[0] - 1
        if history:
            x = torch.cat([x[:, :, :1].expand(-1, -1, history, -1, -1), x], dim=2)
        return self.convolve(x)

    def convolve(self, x: Tensor) -> Tensor:
        """The convolution alone, for an x that has its earlier frames in front."""
        to_torch = torch.is_grad_enabled() or requested("auto") != "auto"
        # torch.compile cannot trace the other.
        if to_torch or torch.compiler.is_compiling() or not onednn.is_usable(self.weight):
            return super().forward(x)
        return onednn.conv3d(x, self.weight, self.bias, self.stride, self.padding)


class FrameConv2d(nn.Conv2d):
    """2D convolution of every frame."""

    def forward(self, x: Tensor) -> Tensor:
        return _unfold_frames(super().forward(_fold_frames(x)), x.shape[0])


class FrameGroupNorm(nn.GroupNorm):
    """GroupNorm with statistics of its own for every frame."""

    def forward(self, x: Tensor) -> Tensor:
        return _unfold_frames(super().forward(_fold_frames(x)), x.shape[0])


def _fold_frames(x: Tensor) -> Tensor:
    """(B, C, T, H, W) to (B * T, C, H, W)."""
    return x.transpose(1, 2).flatten(0, 1)


def _unfold_frames(x: Tensor, batch: int) -> Tensor:
    """(B * T, C, H, W) to (B, C, T, H, W)."""
    return x.unflatten(0, (batch, -1)).transpose(1, 2)


class LayerKind(NamedTuple):
    """The layers of a level: of single frames (2D) or causal in time (3D)."""

    conv: type[FrameConv2d] | type[CausalConv3d]
    norm: type[nn.GroupNorm]

    @classmethod
    def of(cls, block_type: str) -> "LayerKind":
        if is_causal(block_type):
            return cls(CausalConv3d, nn.GroupNorm)
        return cls(FrameConv2d, FrameGroupNorm)


class ResBlock(nn.Module):
    """Residual block: twice GroupNorm, SiLU, convolution."""

    def __init__(self, in_channels: int, out_channels: int, groups: int, kind: LayerKind):
        super().__init__()
        self.norm1 = kind.norm(groups, in_channels, eps=NORM_EPS)
        self.conv1 = kind.conv(in_channels, out_channels, 3, padding=1)
        self.norm2 = kind.norm(groups, out_channels, eps=NORM_EPS)
        self.conv2 = kind.conv(out_channels, out_channels, 3, padding=1)
        changes = in_channels != out_channels
        self.conv_shortcut = kind.conv(in_channels, out_channels, 1) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + self.shortcut(x)

    def shortcut(self, x: Tensor) -> Tensor:
        return x if self.conv_shortcut is None else self.conv_shortcut(x)


class Attention(nn.Module):
    """Single-head self-attention inside every frame, with a residual connection."""

    def __init__(self, channels: int, groups: int, kind: LayerKind):
        super().__init__()
        self.group_norm = kind.norm(groups, channels, eps=NORM_EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        batch, _, _, height, width = x.shape
        tokens = _fold_frames(self.group_norm(x)).flatten(2).transpose(1, 2)
        # A head axis of one, for scaled_dot_product_attention.
        q, k, v = (project(tokens)[:, None] for project in (self.to_q, self.to_k, self.to_v))
        h = self.to_out[0](F.scaled_dot_product_attention(q, k, v)[:, 0])
        h = h.transpose(1, 2).unflatten(2, (height, width))
        return x + _unfold_frames(h, batch)


class MidBlock(nn.Module):
    """Residual block, attention, residual block."""

    def __init__(self, channels: int, groups: int, kind: LayerKind):
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(channels, channels, groups, kind) for _ in range(2))
        self.attentions = nn.ModuleList([Attention(channels, groups, kind)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Downsample(nn.Module):
    """Halve height and width, and time too with a causal convolution: 2n + 1 frames to n + 1."""

    def __init__(self, channels: int, conv: type[FrameConv2d] | type[CausalConv3d]):
        super().__init__()
        self.conv = conv(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.pad(x))

    @staticmethod
    def pad(x: Tensor) -> Tensor:
        """Zeros at the right and the bottom, so that a stride of two halves even sizes."""
        return F.pad(x, (0, 1, 0, 1))


class Upsample(nn.Module):
    """Double height and width, then a convolution; with `in_time`, n + 1 frames become 2n + 1.

    In time the first frame stays single and the others are doubled. They are interpolated
    linearly, in space too, the first frame being no neighbour of the second. Without `in_time`
    space is doubled by repetition.
    """

    def __init__(self, channels: int, conv: type[FrameConv2d] | type[CausalConv3d], in_time: bool):
        super().__init__()
        self.in_time = in_time
        kernel = (1, 3, 3) if conv is CausalConv3d and not in_time else 3
        self.conv = conv(channels, channels, kernel, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if not self.in_time:
            return self.conv(repeat_pixels(x))
        first, others = x[:, :, :1], x[:, :, 1:]
        parts = [interpolate_pixels(first)]
        if others.shape[2]:
            parts.append(F.interpolate(others, scale_factor=(2, 2, 2), mode="trilinear"))
        return self.conv(torch.cat(parts, dim=2))


def repeat_pixels(x: Tensor) -> Tensor:
    """Double height and width by repetition."""
    return F.interpolate(x, scale_factor=(1, 2, 2), mode="nearest")


def interpolate_pixels(x: Tensor) -> Tensor:
    """Double height and width by linear interpolation."""
    return F.interpolate(x, scale_factor=(1, 2, 2), mode="trilinear")


class DownBlock(nn.Module):
    """A level of the encoder; `downsample` is the kind of the next level, None for the last."""

    def __init__(self, in_channels, out_channels, depth, groups, kind, downsample):
        super().__init__()
        inputs = [in_channels] + [out_channels] * (depth - 1)
        self.resnets = nn.ModuleList(ResBlock(c, out_channels, groups, kind) for c in inputs)
        layers = [] if downsample is None else [Downsample(out_channels, downsample.conv)]
        self.downsamplers = nn.ModuleList(layers)


class UpBlock(nn.Module):
    """A level of the decoder, with the layer that leads to the next one where there is one."""

    def __init__(self, in_channels, out_channels, depth, groups, kind, upsample: bool, in_time):
        super().__init__()
        inputs = [in_channels] + [out_channels] * (depth - 1)
        self.resnets = nn.ModuleList(ResBlock(c, out_channels, groups, kind) for c in inputs)
        layers = [Upsample(out_channels, kind.conv, in_time)] if upsample else []
        self.upsamplers = nn.ModuleList(layers)


class Encoder(nn.Module):
    """Pixels (B, in_channels, T, H, W) to the features (B, 2 * latent_channels, t, h, w)."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        channels, groups = config.block_out_channels, config.norm_num_groups
        kinds = [LayerKind.of(name) for name in config.down_block_types]
        depth = config.layers_per_block
        self.conv_in = FrameConv2d(config.in_channels, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownBlock(c_in, c_out, depth, groups, kind, next_kind)
            for c_in, c_out, kind, next_kind in zip(
                (channels[0], *channels[:-1]), channels, kinds, (*kinds[1:], None), strict=True
            )
        )
        self.mid_block = MidBlock(channels[-1], groups, kinds[-1])
        self.conv_norm_out = kinds[-1].norm(groups, channels[-1], eps=NORM_EPS)
        self.conv_out = kinds[-1].conv(channels[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages():
            x = stage(x)
        return self.output(x)

    def stages(self) -> Iterator[nn.Module]:
        """The layers before `output`, in order."""
        yield self.conv_in
        for block in self.down_blocks:
            yield from block.resnets
            yield from block.downsamplers
        yield self.mid_block

    def output(self, x: Tensor) -> Tensor:
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Decoder(nn.Module):
    """Latents (B, latent_channels, t, h, w) to pixels (B, out_channels, T, H, W).

    The last upsampler leaves time alone; in a 3D decoder the ones before it double the frames.
    """

    def __init__(self, config: VAEConfig):
        super().__init__()
        channels, groups = config.block_out_channels[::-1], config.norm_num_groups
        kind = LayerKind.of(config.up_block_types[0])
        depth, last = config.layers_per_block + 1, len(channels) - 1
        self.conv_in = kind.conv(config.latent_channels, channels[0], 3, padding=1)
        self.mid_block = MidBlock(channels[0], groups, kind)
        self.up_blocks = nn.ModuleList(
            UpBlock(
                channels[max(level - 1, 0)],
                channels[level],
                depth,
                groups,
                kind,
                upsample=level < last,
                in_time=kind.conv is CausalConv3d and level < last - 1,
            )
            for level in range(len(channels))
        )
        self.conv_norm_out = kind.norm(groups, channels[-1], eps=NORM_EPS)
        self.conv_out = kind.conv(channels[-1], config.out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages():
            x = stage(x)
        return self.output(x)

    def stages(self) -> Iterator[nn.Module]:
        """The layers before `output`, in order."""
        yield self.conv_in
        yield self.mid_block
        for block in self.up_blocks:
            yield from block.resnets
            yield from block.upsamplers

    def output(self, x: Tensor) -> Tensor:
        return self.conv_out(F.silu(self.conv_norm_out(x)))
