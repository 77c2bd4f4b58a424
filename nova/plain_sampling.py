"""NOVA's sampling loops as the paper states them, with nothing saved: to read, and to compare with.

`sampling.py` computes the same. The tests hold the two against each other, and
`benchmarks/fps.py` measures the difference.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from .conditioning import Conditioning
from .guidance import Guidance
from .layers import KeyValueCache, Rotary, patchify, unpatchify
from .model import NOVATransformer
from .noise import NoiseSource
from .schedule import DiffusionSchedule


@torch.inference_mode()
def generate_frames_plain(
    model: NOVATransformer,
    conditioning: Conditioning,
    *,
    num_frames: int,
    set_sizes: list[int],
    schedule: DiffusionSchedule,
    guidance: Guidance,
    noise: NoiseSource,
    given_latents: Tensor | None = None,
) -> Iterator[Tensor]:
    """Frame loop. Arguments and what is yielded: see `sampling.generate_frames`."""
    batch, passes = conditioning.batch_size, guidance.passes
    prefix = conditioning.tokens
    given = [] if given_latents is None else list(given_latents.unbind(2))
    positions, angles = model.video_positions(num_frames), model.video_rotary(num_frames)
    max_length = prefix.shape[1] + num_frames * model.config.num_frame_tokens
    caches = [KeyValueCache(max_length) for _ in model.video_encoder.blocks]
    image_tables = model.image_positions(), model.image_rotary()
    latents = first = order = None
    for t in range(num_frames):
        position = None if positions is None else positions[t : t + 1]
        if t == 0:
            c = model.embed_first_frame(batch, position)
        else:
            c = model.embed_frames(latents[:, :, None], position)
        c = torch.stack([c[:, 0]] * passes)
        if passes == 3:
            c[1] = model.mask_embed.bos_token
        c = c.flatten(0, 1)
        rotary = None
        if angles is not None:
            frame_angles = angles.chunk(num_frames)[t]
            in_front = prefix.shape[1] if t == 0 else 0
            rotary = _rotary(frame_angles[None], in_front, model.dtype)
        c = torch.cat([prefix, c], dim=1) if t == 0 else c
        c = model.encode_video(c, rotary=rotary, caches=caches)
        if t == 0:
            c = first = c[:, prefix.shape[1] :]
        else:
            c = model.mix(first, c)
        if t < len(given):
            latents = given[t]
            continue
        if order is None:
            order = noise.uniform(model.config.num_image_tokens, 1).argsort(dim=1)
        latents = _generate_frame(
            model, c, order, image_tables, set_sizes, schedule, guidance, noise
        )
        yield latents.clone()


def _rotary(angles: Tensor, in_front: int, dtype: torch.dtype) -> Rotary:
    return Rotary.from_angles(F.pad(angles, (0, 0, in_front, 0)), dtype)


def _generate_frame(
    model: NOVATransformer,
    c: Tensor,
    order: Tensor,
    tables: tuple[Tensor | None, Tensor | None],
    set_sizes: list[int],
    schedule: DiffusionSchedule,
    guidance: Guidance,
    noise: NoiseSource,
) -> Tensor:
    """Set loop: (B, channels, h, w) latents from the condition c (passes * B, C, E).

    `tables` are the image encoder's absolute positions and rotary angles, one of them None.
    """
    table, angles = tables
    config = model.config
    batch, passes = order.shape[0], guidance.passes
    latents = c.new_zeros(batch, *config.latent_shape)
    mask = c.new_ones(batch, config.num_image_tokens, 1)
    for step, size in enumerate(set_sizes):
        start = sum(set_sizes[:step])
        revealed, ids = order[:, :start], order[:, start : start + size]
        tokens = model.image_encoder.patch_embed(latents)
        tokens = tokens * (1 - mask) + model.mask_embed.mask_token * mask
        tokens = tokens if table is None else tokens + table
        z = _encode_image(
            model, c, tokens.repeat(passes, 1, 1), revealed.repeat(passes, 1, 1), angles
        )
        scale = guidance.scale_at(step, len(set_sizes))
        sample = _denoise(model, z, ids.repeat(passes, 1, 1), schedule, guidance, scale, noise)
        in_set = torch.zeros_like(mask).scatter_(1, ids, 1)
        mask = mask * (1 - in_set)
        latents = latents + unpatchify(sample * in_set, config.patch_size, config.latent_size)
    return latents


def _encode_image(
    model: NOVATransformer, c: Tensor, tokens: Tensor, revealed: Tensor, angles: Tensor | None
) -> Tensor:
    """First half of the blocks on [c, revealed tokens], second on [c, all tokens]."""
    blocks, count = model.image_encoder.blocks, c.shape[1]
    first_rotary = rotary = None
    if angles is not None:
        angles = angles.expand(len(c), -1, -1)
        chosen = angles.gather(1, revealed.expand(-1, -1, angles.shape[-1]))
        first_rotary = _rotary(chosen, count, model.dtype)
        rotary = _rotary(angles, count, model.dtype)
    index = revealed.expand(-1, -1, tokens.shape[-1])
    x = torch.cat([c, tokens.gather(1, index)], dim=1)
    for block in blocks[: len(blocks) // 2]:
        x = block(x, rotary=first_rotary)
    x = torch.cat([x[:, :count], tokens.scatter(1, index, x[:, count:])], dim=1)
    for block in blocks[len(blocks) // 2 :]:
        x = block(x, rotary=rotary)
    return model.image_encoder.norm(x[:, count:])


def _denoise(
    model: NOVATransformer,
    z: Tensor,
    ids: Tensor,
    schedule: DiffusionSchedule,
    guidance: Guidance,
    scale: float,
    noise: NoiseSource,
) -> Tensor:
    """Denoise loop on the whole frame; the MLP runs on the set's tokens of every pass."""
    config, head = model.config, model.image_decoder
    batch = len(z) // guidance.passes
    latents = noise.normal(*config.latent_shape)
    passes = guidance.passes
    for d, timestep in enumerate(schedule.timesteps):
        if passes > 1 and timestep < guidance.trunc:
            passes, z, ids = 1, z[:batch], ids[:batch]
        x = latents.repeat(passes, 1, 1, 1)
        embedded = head.patch_embed(x)
        h = embedded.gather(1, ids.expand(-1, -1, embedded.shape[-1]))
        z_set = z.gather(1, ids.expand(-1, -1, z.shape[-1]))
        time = torch.full((len(x), 1), timestep, dtype=torch.float32, device=x.device)
        embed = head.time_cond_embed
        condition = F.silu(embed.condition_proj(z_set) + embed.embed_timesteps(time))
        for block in head.blocks:
            h = block(h, condition)
        predicted = head.predict_tokens(h, condition)
        # Outside the set the prediction is the noisy frame itself.
        whole = patchify(x, config.patch_size)
        whole = whole.scatter(1, ids.expand(-1, -1, whole.shape[-1]), predicted)
        prediction = _combine(whole.chunk(passes), guidance, scale)
        prediction = unpatchify(prediction, config.patch_size, config.latent_size)
        latents = schedule.sample[d] * latents + schedule.prediction[d] * prediction
        if schedule.noise[d] != 0.0:
            latents = latents + schedule.noise[d] * noise.normal(*config.latent_shape)
    return patchify(latents, config.patch_size)


def _combine(predictions: tuple[Tensor, ...], guidance: Guidance, scale: float) -> Tensor:
    if len(predictions) == 1:
        return predictions[0]
    cond, uncond = predictions[:2]
    image = predictions[2] if len(predictions) == 3 else uncond
    guided = uncond + scale * (cond - image)
    if guidance.renorm < 1:
        factor = cond.norm(dim=(1, 2), keepdim=True) / guided.norm(dim=(1, 2), keepdim=True)
        guided = guided * factor.clamp(guidance.renorm, 1.0)
    if len(predictions) == 3:
        guided = guided + guidance.image_scale * (image - uncond)
    return guided
