"""Which parameters are trained, and by which optimiser."""

import torch
from torch import nn
from torch.optim import Optimizer

from ..altered_layers import weights_to_save
from ..errors import DependencyError, InputError
from ..model import NOVATransformer
from .options import RunOptions


def check_trainable(module: nn.Module, fresh: nn.Module, what: str) -> None:
    """Whether training gets anywhere, and checkpoints can hold what it makes.

    Args:
        fresh, what: see `weights_to_save`.

    Raises:
        InputError: weights of another dtype than float32: small updates would be rounded away.
        CheckpointError: adapters or quantised layers, for which no checkpoint has a place.
    """
    others = {p.dtype for p in module.parameters()} - {torch.float32}
    if others:
        raise InputError(
            f"training keeps weights in float32, and these are {others.pop()}: open the checkpoint "
            'with torch_dtype=torch.float32. TrainingOptions(precision="bfloat16") computes in it'
        )
    weights_to_save(module, fresh, what)


def freeze(
    model: NOVATransformer, num_frames: int, *, text_norm: bool, motion: bool
) -> NOVATransformer:
    """Make a model trainable but for the parts that stay as they are.

    With `text_norm` and `motion` these are the reference's.

    Args:
        num_frames: latent frames of the data. An image has no frame before it, so that nothing
            reads frame tokens or mixes features: those layers get no gradient, and would make
            processes wait for it. Its time embedding is that of frame 0 alone, and clips need it
            as it is for all frames.
        text_norm: freeze the LayerNorm of the text or class embedding.
        motion: freeze the motion embedding.
    """
    model.train().requires_grad_(True)
    frozen: list[nn.Module] = []
    if text_norm:
        embed = model.text_embed if model.config.text_token_dim else model.label_embed
        frozen.append(embed.norm)
    if motion and model.config.is_video:
        frozen.append(model.motion_embed)
    if num_frames == 1:
        frozen.append(model.video_encoder.patch_embed)
        if model.config.video_mixer_rank:
            frozen.append(model.video_encoder.mixer)
        if not model.config.rotary_pos_embed:
            frozen.append(model.video_pos_embed)
    for module in frozen:
        module.requires_grad_(False)
    return model


def make_optimizers(objective: nn.Module, options: RunOptions) -> list[Optimizer]:
    """AdamW for all that is trained, or Muon for the matrices of blocks and AdamW for the rest.

    Muon (arXiv 2502.16982: momentum made orthogonal, scaled to the size of AdamW's updates) takes
    AdamW's learning rate and weight decay. Matrices and kernels decay; biases, norms and lone
    vectors do not.

    Raises:
        DependencyError: this torch has no Muon.
    """
    trained = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    rate, decay = options.learning_rate, options.weight_decay
    optimizers: list[Optimizer] = []
    if options.optimizer == "muon":
        if not hasattr(torch.optim, "Muon"):
            raise DependencyError(
                f"torch {torch.__version__} has no Muon; use torch 2.9 or newer, or adamw"
            )
        names = [name for name, p in trained.items() if ".blocks." in name and p.dim() == 2]
        matrices = [trained.pop(name) for name in names]
        if matrices:
            optimizers.append(
                torch.optim.Muon(matrices, rate, decay, adjust_lr_fn="match_rms_adamw")
            )
    # Tokens are stored as (1, E).
    decaying = [p for p in trained.values() if p.dim() >= 2 and p.shape[0] > 1]
    others = [p for p in trained.values() if not (p.dim() >= 2 and p.shape[0] > 1)]
    groups = [
        {"params": params, "weight_decay": group_decay}
        for params, group_decay in ((decaying, decay), (others, 0.0))
        if params
    ]
    return [*optimizers, torch.optim.AdamW(groups, rate, betas=options.betas, fused=True)]
