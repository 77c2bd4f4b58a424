"""The exact sampler: frame loop -> set loop -> denoise loop.

The same function as the loops of `plain_sampling.py`, which state the algorithm; what this one
saves is listed in docs/sampling.md. All that a run remembers is in `VideoContext` (frame loop) and
`TokenOrder` (set loop).
"""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor

from nova_kernels.autocast import without_autocast

from .conditioning import Conditioning
from .denoising import NoisyTokens, SetNoise
from .engine import SamplingGraphs
from .errors import InputError
from .guidance import Guidance
from .head import PreparedHead
from .layers import patchify, unpatchify
from .model import NOVATransformer
from .noise import NoiseSource
from .packed_blocks import packed_blocks
from .schedule import DiffusionSchedule
from .set_step import SetNumbers, SetSteps
from .token_order import TokenOrder
from .video_context import VideoContext


@dataclass(frozen=True)
class SetEnd:
    """What `on_set_end` is told after every autoregressive step.

    Attributes:
        frame: index of the latent frame; set_index: of the step in it; num_sets: steps a frame.
        latents: (B, channels, h, w) the frame so far, zeros where nothing is revealed.
    """

    frame: int
    set_index: int
    num_sets: int
    latents: Tensor


OnSetEnd = Callable[[SetEnd], Tensor | None]


def generate_frames(
    model: NOVATransformer,
    conditioning: Conditioning,
    *,
    num_frames: int,
    set_sizes: list[int],
    schedule: DiffusionSchedule,
    guidance: Guidance,
    noise: NoiseSource,
    given_latents: Tensor | None = None,
    context_frames: int | None = None,
    on_set_end: OnSetEnd | None = None,
    graphs: SamplingGraphs | None = None,
) -> Iterator[Tensor]:
    """Generate the frames of a batch of clips, one after the other.

    Everything is computed in the model's dtype; torch.autocast has no effect.

    Args:
        num_frames: latent frames in all, given ones included.
        given_latents: (B, channels, K, h, w) frames to go on from, K < num_frames; they pass
            through the video encoder in one block-causal pass and are not yielded.
        context_frames: for clips longer than the model was trained for: at most this many frames
            are seen at a time; when they are full, the later half of them starts the next window,
            with positions from 0 again. None: all frames are seen, at positions squeezed into the
            trained range (absolute) or counted on (rotary), as the reference does.
        on_set_end: called after every step; what it returns, if not None, replaces the latents
            of the frame so far (B, channels, h, w).
        graphs: replay the video encoder and the steps of the set loop from CUDA graphs, which are
            recorded into it.

    Yields:
        (B, channels, h, w) latents of every generated frame.

    Raises:
        InputError: shapes or counts that do not fit.
    """
    window = num_frames if context_frames is None else min(context_frames, num_frames)
    history = _given_frames(model, conditioning, given_latents, num_frames)
    if window < 1 or (window < 2 and num_frames > 1):
        raise InputError(f"context_frames must be at least 2, got {context_frames}")
    device = model.device
    with torch.inference_mode(), without_autocast(device):
        timesteps = torch.tensor(schedule.timesteps, dtype=torch.float32, device=device)
        head = PreparedHead(model.image_decoder, timesteps)
        blocks = packed_blocks(model.image_encoder.blocks)
        steps = SetSteps(model, head, schedule, guidance, blocks)
        if graphs is None:
            context = VideoContext(model, conditioning, guidance, window)
        else:
            steps = graphs.steps(steps, set_sizes)
            context = graphs.video_context(model, conditioning, guidance, window)
        order: TokenOrder | None = None
    with closing(context):
        for frame in range(len(history), num_frames):
            with torch.inference_mode(), without_autocast(device):
                if context.num_seen in (0, window):
                    is_full = frame >= window
                    cond = context.start(history[-(window // 2) :] if is_full else history)
                else:
                    cond = context.advance(history[-1])
                if order is None:
                    order = TokenOrder.draw(model, noise, guidance.passes)
                latents = generate_frame(
                    steps,
                    cond,
                    order,
                    set_sizes=set_sizes,
                    noise=noise,
                    frame=frame,
                    on_set_end=on_set_end,
                )
            history.append(latents)
            del history[:-window]  # never read again; a stream may be long
            # A clone made outside inference mode is an ordinary tensor: callers may edit it.
            yield latents.clone()


def _given_frames(
    model: NOVATransformer, conditioning: Conditioning, given: Tensor | None, num_frames: int
) -> list[Tensor]:
    if num_frames < 1:
        raise InputError(f"max_latent_length must be at least 1, got {num_frames}")
    if num_frames > 1 and not model.config.is_video:
        raise InputError("this is an image model: max_latent_length must be 1")
    if given is None:
        return []
    expected = (conditioning.batch_size, *model.config.latent_shape)
    if given.dim() != 5 or (given.shape[0], given.shape[1], *given.shape[3:]) != expected:
        batch, channels, height, width = expected
        raise InputError(
            f"given latents must have the shape ({batch}, {channels}, frames, {height}, {width}), "
            f"got {tuple(given.shape)}"
        )
    if given.shape[2] >= num_frames:
        raise InputError(
            f"{given.shape[2]} latent frames are given and {num_frames} wanted in all, so there is "
            "nothing to generate; raise max_latent_length"
        )
    if not torch.isfinite(given).all():
        raise InputError("given latents hold NaN or infinite values")
    return list(given.to(model.device, model.dtype).unbind(2))


def generate_frame(
    steps: SetSteps,
    cond: Tensor,
    order: TokenOrder,
    *,
    set_sizes: list[int],
    noise: NoiseSource,
    frame: int = 0,
    on_set_end: OnSetEnd | None = None,
) -> Tensor:
    """The set loop: reveal a frame's tokens set by set.

    Args:
        steps: of the run.
        cond: (passes * B, C, E) of `VideoContext`.
        frame: index that `on_set_end` is told.

    Returns:
        (B, channels, h, w) latents.
    """
    config, schedule, guidance = steps.model.config, steps.schedule, steps.guidance
    patch_embed = steps.model.image_encoder.patch_embed
    tokens = cond.new_zeros(*order.order.shape, config.token_dim)
    start = 0
    with steps.frame(cond, order) as tensors:
        for index, size in enumerate(set_sizes):
            stop = start + size
            noisy = NoisyTokens(noise, order, start, stop, config.latent_shape, config.patch_size)
            tokens[:, start:stop] = steps.run(
                tensors,
                SetNoise.draw(noisy, schedule, guidance),
                SetNumbers(start, stop, guidance.scale_at(index, len(set_sizes))),
            )
            changed = start
            if on_set_end is not None:
                latents = unpatchify(order.to_raster(tokens), config.patch_size, config.latent_size)
                replaced = on_set_end(SetEnd(frame, index, len(set_sizes), latents))
                if replaced is not None:
                    raster = patchify(replaced.to(tokens), config.patch_size)
                    tokens[:, :stop] = order.select(raster, 0, stop)
                    changed = 0
            fresh = patch_embed.embed_tokens(tokens[:, changed:stop])
            fresh = fresh + order.positions[:, changed:stop]
            tensors.embedded[:, changed:stop] = fresh.repeat(order.passes, 1, 1)
            start = stop
    return unpatchify(order.to_raster(tokens), config.patch_size, config.latent_size)
