"""The training objective: block-causal video encoding, masked image modelling, diffusion loss.

docs/model.md states it; the random draws of a step are an argument, so that a step can be repeated.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .layers import Rotary, patchify
from .model import NOVATransformer
from .schedule import DDPMConfig, FlowMatchConfig, SchedulerConfig


@dataclass(frozen=True)
class TrainingDraws:
    """Random draws of one step. S = B * T samples (every frame of every clip, batch-major).

    Attributes:
        visible: (S, n) indices of the tokens that the encoder sees; the others, at least one, are
            masked.
        noise: (R * S, N, token_dim) with R repeats of the whole batch, one after the other.
        timestep_index: (R * S, N) integers: rows of the scheduler's training table.
    """

    visible: Tensor
    noise: Tensor
    timestep_index: Tensor


def training_losses(
    model: NOVATransformer,
    latents: Tensor,
    prefix: Tensor,
    draws: TrainingDraws,
    scheduler: SchedulerConfig,
) -> dict[str, Tensor]:
    """Losses of one step.

    Args:
        latents: (B, channels, T, h, w) scaled latents of clips; T = 1 for images.
        prefix: (B, P, E) conditioning tokens (text or label, motion), with gradients.
        scheduler: what the noise is added by; flow matching predicts noise - x, DDPM epsilon.

    Returns:
        {"loss": scalar} for images; {"loss_t2i", "loss_i2i"} for clips: means over the masked
        tokens of frame 0, and of frames 1 to T - 1. Their plain sum is what is optimised.
    """
    batch, _, frames = latents.shape[:3]
    cond = encode_clip(model, latents, prefix)
    samples = latents.transpose(1, 2).flatten(0, 1)
    z = _encode_masked(model, cond.flatten(0, 1), samples, draws.visible)
    per_token = _diffusion_loss(model, z, samples, draws, scheduler)
    masked = torch.ones(z.shape[:2], dtype=torch.float32, device=z.device)
    masked.scatter_(1, draws.visible.long(), 0.0)
    repeats = len(per_token) // len(z)
    masked = masked.repeat(repeats, 1)
    if frames == 1:
        return {"loss": _masked_mean(per_token, masked)}
    per_token, masked = (x.unflatten(0, (-1, frames)) for x in (per_token, masked))
    return {
        "loss_t2i": _masked_mean(per_token[:, 0], masked[:, 0]),
        "loss_i2i": _masked_mean(per_token[:, 1:], masked[:, 1:]),
    }


def _masked_mean(loss: Tensor, masked: Tensor) -> Tensor:
    return (loss * masked).sum() / masked.sum()


def encode_clip(model: NOVATransformer, latents: Tensor, prefix: Tensor) -> Tensor:
    """The image encoder's condition for every frame of clips, in one block-causal pass.

    Args:
        latents: (B, channels, T, h, w); frame T - 1 is not read, nothing comes after it.
        prefix: (B, P, E).

    Returns:
        (B, T, C, E).
    """
    batch, _, frames = latents.shape[:3]
    positions = model.video_positions(frames)
    first, later = (None, None) if positions is None else (positions[:1], positions[1:])
    tokens = model.embed_first_frame(batch, first)
    if frames > 1:
        tokens = torch.cat([tokens, model.embed_frames(latents[:, :, :-1], later)], dim=1)
    per_frame, in_front = model.config.num_frame_tokens, prefix.shape[1]
    rotary = None
    if (angles := model.video_rotary(frames)) is not None:
        rotary = Rotary.from_angles(F.pad(angles, (0, 0, in_front, 0)), model.dtype)
    out = model.encode_video(
        torch.cat([prefix, tokens.flatten(1, 2)], dim=1),
        rotary=rotary,
        block_lengths=[in_front + per_frame] + [per_frame] * (frames - 1),
    )
    out = out[:, in_front:].unflatten(1, (frames, per_frame))
    if frames == 1:
        return out
    return torch.cat([out[:, :1], model.mix(out[:, :1], out[:, 1:])], dim=1)


def _encode_masked(
    model: NOVATransformer, cond: Tensor, samples: Tensor, visible: Tensor
) -> Tensor:
    """(S, N, E) encoder output, raster order, with `visible` tokens (S, n) revealed."""
    count = model.config.num_image_tokens
    hidden = torch.ones(len(visible), count, dtype=torch.bool, device=visible.device)
    hidden.scatter_(1, visible.long(), False)
    # Visible first, then masked: a permutation of the tokens of every sample. Sorted, since for
    # `nonzero` the host would wait for a GPU.
    hidden_ids = hidden.byte().argsort(dim=1, stable=True)[:, visible.shape[1] :]
    order = torch.cat([visible.long(), hidden_ids], dim=1)
    embedded = model.image_encoder.patch_embed(samples)
    masked = model.mask_embed.mask_token.expand_as(embedded)
    rotary = None
    if (table := model.image_positions()) is not None:
        embedded, masked = embedded + table, masked + table
    if (angles := model.image_rotary()) is not None:
        rotary = Rotary.from_angles(F.pad(angles[order], (0, 0, cond.shape[1], 0)), model.dtype)
    z = model.encode_image(
        cond, _rows(embedded, visible.long()), _rows(masked, hidden_ids), rotary=rotary
    )
    return _rows(z, order.argsort(dim=1))


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """x (S, N, d) at index (S, n) -> (S, n, d)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def _diffusion_loss(
    model: NOVATransformer,
    z: Tensor,
    samples: Tensor,
    draws: TrainingDraws,
    scheduler: SchedulerConfig,
) -> Tensor:
    """(R * S, N) squared error of every token, averaged over its values."""
    repeats = len(draws.noise) // len(z)
    x = patchify(samples, model.config.patch_size).repeat(repeats, 1, 1)
    z = z.repeat(repeats, 1, 1)
    noise, index = draws.noise.to(x), draws.timestep_index.long()
    noisy, timesteps, target = add_noise(x, noise, index, scheduler)
    prediction = model.image_decoder(noisy, timesteps, z)
    return F.mse_loss(prediction.float(), target.float(), reduction="none").mean(-1)


def add_noise(
    x: Tensor, noise: Tensor, index: Tensor, scheduler: SchedulerConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy tokens, their timesteps, and the target of the prediction.

    Args:
        x, noise: (M, N, token_dim).
        index: (M, N) rows of the training table: for flow matching it is descending in time, for
            DDPM the row is the timestep.
    """
    if isinstance(scheduler, FlowMatchConfig):
        timesteps, sigmas = (table.to(x.device)[index] for table in scheduler.training_tables())
        sigma = sigmas[..., None].to(x.dtype)
        return sigma * noise + (1 - sigma) * x, timesteps, noise - x
    bar = scheduler.alphas_cumprod().to(x.device)[index][..., None]
    signal, spread = bar.sqrt().to(x.dtype), (1 - bar).sqrt().to(x.dtype)
    targets = {
        "epsilon": noise,
        "sample": x,
        "v_prediction": signal * noise - spread * x,
    }
    noisy = signal * x + spread * noise
    return noisy, index.float(), targets[scheduler.prediction_type]


def draw_training_noise(
    latents: Tensor,
    token_shape: tuple[int, int],
    scheduler: SchedulerConfig,
    *,
    mask_ratio: float,
    repeats: int = 4,
    generator: torch.Generator | None = None,
) -> TrainingDraws:
    """Draw what a step needs.

    Args:
        latents: (B, channels, T, h, w), for shape, dtype and device.
        token_shape: (N, token_dim).
        mask_ratio: share of masked tokens, drawn once a step by the caller; at least one is masked.
    """
    count, token_dim = token_shape
    samples = latents.shape[0] * latents.shape[2]
    options = {"device": latents.device, "generator": generator}
    order = torch.rand(samples, count, dtype=torch.float32, **options).argsort(dim=1)
    # The loss is a mean over masked tokens, of which there must be some.
    visible = order[:, : min(round((1 - mask_ratio) * count), count - 1)]
    noise = torch.randn(repeats * samples, count, token_dim, dtype=latents.dtype, **options)
    table = scheduler.num_train_timesteps
    if isinstance(scheduler, DDPMConfig):
        index = torch.randint(table, noise.shape[:2], **options)
    else:
        normal = torch.randn(noise.shape[:2], dtype=torch.float32, **options)
        index = (normal.sigmoid() * table).long()
    return TrainingDraws(visible, noise, index.clamp_(max=table - 1))
