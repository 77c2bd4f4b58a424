"""Encoding and decoding a tile of time frame by frame, for a fraction of the memory.

The plain forward pass of a decoder holds some four copies of its largest tensor: 25 GB for 17
frames of 480 x 768 in float32. Here a video is a list of single frames. Convolutions in time
remember the few frames that they need, inputs are dropped as soon as their outputs are there, and
GroupNorm, which needs the statistics of all frames before it can change the first, takes a pass
of its own over them. Where even the tensor that this pass sees is too large to be kept, the pass
throws it away and it is computed a second time: `budget`, in bytes, decides. This takes longer
than the plain forward pass. What comes out equals it to rounding. Gradients are not for here.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..altered_layers import uncompiled
from .layers import (
    CausalConv3d,
    Decoder,
    Downsample,
    Encoder,
    ResBlock,
    Upsample,
    interpolate_pixels,
    repeat_pixels,
)

# Convolutions are faster in this layout on CPUs and GPUs, and need no copies of their own.
LAYOUT = torch.channels_last_3d


def decode_framewise(decoder: Decoder, latents: Tensor, budget: float) -> Tensor:
    """`decoder(latents)` with less memory.

    Args:
        latents: (B, C, t, h, w).
        budget: bytes that hidden tensors may take (not a hard limit: a frame or two of every
            layer must fit in any case). Less means more is computed twice.

    Returns:
        Pixels (B, 3, T, H, W).
    """
    if not _mixes_frames(decoder):
        return torch.cat([decoder(frame) for frame in latents.split(1, dim=2)], dim=2)
    conv_in, mid_block, *stages = decoder.stages()
    # The smallest tensors of all need no care.
    frames = FrameList(mid_block(conv_in(latents)).split(1, dim=2))
    for stage in stages:
        run = _res_block if isinstance(uncompiled(stage), ResBlock) else _upsample
        frames = run(stage, frames, budget)
    norm = NormSilu(decoder.conv_norm_out, frames.read_all())
    conv = ConvStream(decoder.conv_out)
    pixels = [conv(norm(frame)) for frame in frames.take_all()]
    return torch.cat(pixels, dim=2).contiguous()


def encode_framewise(encoder: Encoder, pixels: Tensor) -> Tensor:
    """`encoder(pixels)` with less memory: its 2D levels, the largest, go frame by frame.

    Args:
        pixels: (B, 3, T, H, W).

    Returns:
        Features (B, 2 * latent_channels, t, h, w).
    """
    if not _mixes_frames(encoder):
        return torch.cat([encoder(frame) for frame in pixels.split(1, dim=2)], dim=2)
    stages = list(encoder.stages())
    split = [_mixes_frames(stage) for stage in stages].index(True)
    frames = [_run(stages[:split], frame) for frame in pixels.split(1, dim=2)]
    if isinstance(uncompiled(stages[split]), Downsample):
        x = _downsample(stages[split], frames)
        split += 1
    else:
        x = torch.cat(frames, dim=2)
    del frames
    return encoder.output(_run(stages[split:], x))


def _mixes_frames(module: nn.Module) -> bool:
    return any(isinstance(layer, CausalConv3d) for layer in module.modules())


def _run(stages: Iterable[nn.Module], x: Tensor) -> Tensor:
    for stage in stages:
        x = stage(x)
    return x


class FrameList:
    """A video as single frames (B, C, 1, H, W).

    Args:
        frames: the tensors to hold.
        compute: what a frame is, given the tensor held for it; computed at every read.
        growth: how many times larger a frame is than the tensor held for it.
    """

    def __init__(
        self,
        frames: Iterable[Tensor],
        compute: Callable[[Tensor], Tensor] | None = None,
        growth: int = 1,
    ):
        self._frames: list[Tensor | None] = list(frames)
        self._compute = compute
        self.frame_bytes = self._frames[0].nbytes * growth

    def __len__(self) -> int:
        return len(self._frames)

    @property
    def held_bytes(self) -> int:
        return sum(frame.nbytes for frame in self._frames if frame is not None)

    def read(self, index: int) -> Tensor:
        frame = self._frames[index]
        return frame if self._compute is None else self._compute(frame)

    def take(self, index: int) -> Tensor:
        """Read a frame for the last time."""
        frame = self.read(index)
        self._frames[index] = None
        return frame

    def read_all(self) -> Iterator[Tensor]:
        return (self.read(index) for index in range(len(self)))

    def take_all(self) -> Iterator[Tensor]:
        return (self.take(index) for index in range(len(self)))


class NormSilu:
    """GroupNorm with the statistics of all frames, then SiLU, for one frame at a time.

    Args:
        norm: weights, number of groups and epsilon.
        frames: all frames (B, C, 1, H, W), to take the statistics from.
    """

    def __init__(self, norm: nn.GroupNorm, frames: Iterable[Tensor]):
        # Mean and mean square deviation of every row of pixels. All rows have the same length, so
        # the variance of a group is the mean of its rows' variances plus the variance of their
        # means. Unlike sums of squares this does not cancel where the mean is large.
        dtype = torch.promote_types(norm.weight.dtype, torch.float32)
        means, variances = [], []
        for frame in frames:
            rows = frame.to(dtype)
            mean = rows.mean(dim=-1, keepdim=True)
            variances.append(_by_group((rows - mean).square_().mean(dim=-1), norm))
            means.append(_by_group(mean, norm))
        means, variances = torch.cat(means, dim=2), torch.cat(variances, dim=2)
        variance = variances.mean(dim=2) + means.var(dim=2, correction=0)
        deviation = (variance + norm.eps).sqrt()
        # y = (x - mean) / deviation * weight + bias as one multiplication and one addition.
        weight, bias = _precise(norm.weight), _precise(norm.bias)
        per_group = norm.num_channels // norm.num_groups
        scale = weight / deviation.repeat_interleave(per_group, dim=1)
        shift = bias - means.mean(dim=2).repeat_interleave(per_group, dim=1) * scale
        self._scale = scale.to(dtype)[:, :, None, None, None]
        self._shift = shift.to(dtype)[:, :, None, None, None]

    def __call__(self, frame: Tensor) -> Tensor:
        y = torch.addcmul(self._shift, frame.to(self._scale.dtype), self._scale)
        return F.silu(y, inplace=True).to(frame.dtype)


def _by_group(rows: Tensor, norm: nn.GroupNorm) -> Tensor:
    """(B, C, ...) to (B, groups, all else), precise."""
    return _precise(rows).unflatten(1, (norm.num_groups, -1)).flatten(2)


def _precise(x: Tensor) -> Tensor:
    return x.double() if _has_float64(x.device) else x.float()


def _has_float64(device: torch.device) -> bool:
    return device.type != "mps"


class ConvStream:
    """A causal convolution of stride one that is given one frame (B, C, 1, H, W) after another."""

    def __init__(self, conv: CausalConv3d):
        self._conv = conv
        self._window: Tensor | None = None

    def __call__(self, frame: Tensor) -> Tensor:
        length = self._conv.kernel_size[0]
        if self._window is None:
            # Copies of the first frame stand for the frames before it.
            window = frame.expand(-1, -1, length, -1, -1)
            self._window = window.contiguous(memory_format=LAYOUT)
        else:
            # Shifted in place: the window is the largest tensor at work here.
            for index in range(length - 1):
                self._window[:, :, index] = self._window[:, :, index + 1]
            self._window[:, :, -1:] = frame
        return self._conv.convolve(self._window)


def _res_block(block: ResBlock, frames: FrameList, budget: float) -> FrameList:
    """`block` on a video, whose frames are dropped on the way."""
    norm1 = NormSilu(block.norm1, frames.read_all())

    hidden_bytes = frames.frame_bytes * block.conv1.out_channels // block.conv1.in_channels
    # A window of three frames and a copy of one, for each convolution.
    work = 4 * (frames.frame_bytes + hidden_bytes)
    keep = frames.held_bytes + len(frames) * hidden_bytes + work <= budget

    def hidden_frames() -> Iterator[Tensor]:
        conv1 = ConvStream(block.conv1)
        for frame in frames.read_all():
            yield conv1(norm1(frame))

    hidden = FrameList(hidden_frames()) if keep else None
    norm2 = NormSilu(block.norm2, hidden_frames() if hidden is None else hidden.read_all())

    conv1, conv2 = ConvStream(block.conv1), ConvStream(block.conv2)

    def output_frame(index: int) -> Tensor:
        x = frames.take(index)
        h = conv1(norm1(x)) if hidden is None else hidden.take(index)
        return conv2(norm2(h)).add_(block.shortcut(x))

    return FrameList(output_frame(index) for index in range(len(frames)))


def _upsample(layer: Upsample, frames: FrameList, budget: float) -> FrameList:
    """`layer` on a video; where space alone is doubled, the result may be computed when read."""
    if layer.in_time:
        conv = ConvStream(layer.conv)
        return FrameList(conv(frame) for frame in _interpolate(frames))
    upsampled = FrameList(frames.take_all(), lambda x: layer.conv(repeat_pixels(x)), growth=4)
    work = 4 * upsampled.frame_bytes
    all_frames = len(upsampled) * upsampled.frame_bytes
    if upsampled.held_bytes + all_frames + work <= budget:
        return FrameList(upsampled.take_all())
    return upsampled


def _interpolate(frames: FrameList) -> Iterator[Tensor]:
    """The frames that `layers.Upsample` gives its convolution when it doubles time.

    Linear interpolation to twice the frames puts one a quarter before and one a quarter behind
    every frame; at both ends the missing neighbour is the frame itself.
    """
    yield interpolate_pixels(frames.read(0))
    last = len(frames) - 1
    for index in range(1, len(frames)):
        for neighbour in (max(index - 1, 1), min(index + 1, last)):
            mixed = torch.lerp(frames.read(index), frames.read(neighbour), 0.25)
            yield interpolate_pixels(mixed)


def _downsample(layer: Downsample, frames: list[Tensor]) -> Tensor:
    """`layer`, causal, on single frames (B, C, 1, H, W); gives the whole tensor."""
    outputs = []
    for last in range(0, len(frames), layer.conv.stride[0]):
        first = last - layer.conv.kernel_size[0] + 1
        window = [frames[max(index, 0)] for index in range(first, last + 1)]
        outputs.append(layer.conv.convolve(layer.pad(torch.cat(window, dim=2))))
    return torch.cat(outputs, dim=2)
