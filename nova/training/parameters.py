"""Which parameters are trained, and which of them decay."""

from typing import Any

from torch import nn

from ..model import NOVATransformer


def freeze(
    model: NOVATransformer, num_frames: int, *, text_norm: bool, motion: bool
) -> NOVATransformer:
    """Make a model trainable but for the parts that stay as they are.

    Args:
        num_frames: latent frames of the data. An image has no frame before it, so that nothing
            reads frame tokens or mixes features: those layers get no gradient, and would make
            processes wait for it.
        text_norm: freeze the LayerNorm of the text embedding.
        motion: freeze the motion embedding.
    """
    model.train().requires_grad_(True)
    frozen: list[nn.Module] = []
    if text_norm and model.config.text_token_dim:
        frozen.append(model.text_embed.norm)
    if motion and model.config.is_video:
        frozen.append(model.motion_embed)
    if num_frames == 1:
        frozen.append(model.video_encoder.patch_embed)
        if model.config.video_mixer_rank:
            frozen.append(model.video_encoder.mixer)
    for module in frozen:
        module.requires_grad_(False)
    return model


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's groups: matrices and kernels decay; biases, norms and lone vectors do not."""
    trained = [p for p in module.parameters() if p.requires_grad]
    # Tokens are stored as (1, E).
    decaying = [p for p in trained if p.dim() >= 2 and p.shape[0] > 1]
    others = [p for p in trained if not (p.dim() >= 2 and p.shape[0] > 1)]
    groups = [(decaying, weight_decay), (others, 0.0)]
    return [{"params": params, "weight_decay": decay} for params, decay in groups if params]
