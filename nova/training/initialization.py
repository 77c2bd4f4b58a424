"""Weights to start a training from nothing with."""

import torch
from torch import nn

from ..config import ModelConfig
from ..devices import torch_defaults
from ..head import Modulation
from ..layers import Attention
from ..model import NOVATransformer
from ..vae import CausalVideoVAE, VAEConfig
from ..vae.layers import Attention as FrameAttention
from ..vae.layers import ResBlock

QKV_STD = 0.02
NARROW_LOGVAR = -4.0  # a standard deviation of 0.14, beside means of about 1


def new_model(config: ModelConfig, seed: int = 0) -> NOVATransformer:
    """A float32 model on the CPU with fresh weights; torch's global generator stays as it is.

    Linear and patch layers are Xavier-uniform with zero biases, but queries, keys and values start
    small: the norms come after attention, what goes into it grows from block to block, and with
    larger ones small models fixed it to single tokens and did not learn from their prompts. The
    projections of the adaptive norms and the last layer are zero (as in DiT, arXiv 2212.09748): the
    diffusion MLP starts by predicting zero, with identity blocks. So is the null prompt.
    """
    with torch.random.fork_rng(devices=[]), torch_defaults(torch.float32, "cpu"):
        torch.manual_seed(seed)
        model = NOVATransformer(config)
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                # A patch layer is a linear one on flattened patches.
                nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in model.modules():
            if isinstance(module, Attention):
                nn.init.normal_(module.qkv.weight, std=QKV_STD)
    if config.text_token_dim:
        # Padding would be constant tokens that attention clings to before it finds the prompt.
        nn.init.zeros_(model.text_embed.weight)
    for module in model.modules():
        if isinstance(module, Modulation):
            nn.init.zeros_(module.proj.weight)
    nn.init.zeros_(model.image_decoder.head.weight)
    return model


def new_vae(config: VAEConfig, seed: int = 0) -> CausalVideoVAE:
    """A float32 VAE on the CPU with fresh weights; torch's global generator stays as it is.

    Normal weights that keep the variance of their input, zero biases. Residual branches start at
    zero, and the posterior narrow, so that from the first step pixels pass through to the decoder.
    """
    with torch.random.fork_rng(devices=[]), torch_defaults(torch.float32, "cpu"):
        torch.manual_seed(seed)
        vae = CausalVideoVAE(config)
        for module in vae.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d | nn.Linear):
                nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
                nn.init.zeros_(module.bias)
    for module in vae.modules():
        if isinstance(module, ResBlock):
            nn.init.zeros_(module.conv2.weight)
        elif isinstance(module, FrameAttention):
            nn.init.zeros_(module.to_out[0].weight)
    moments = vae.quant_conv if config.use_quant_conv else vae.encoder.conv_out
    with torch.no_grad():
        moments.weight[config.latent_channels :] *= 0.1
        moments.bias[config.latent_channels :] = NARROW_LOGVAR
    return vae
