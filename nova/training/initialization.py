"""Weights to start a training from nothing with."""

import torch
from torch import nn

from ..config import ModelConfig
from ..head import Modulation
from ..model import NOVATransformer
from ..vae import CausalVideoVAE, VAEConfig


def new_model(config: ModelConfig, seed: int = 0) -> NOVATransformer:
    """A float32 model with fresh weights; torch's global generator stays as it is.

    Linear and patch layers are Xavier-uniform with zero biases. The projections of the adaptive
    norms and the last layer are zero (as in DiT, arXiv 2212.09748): the diffusion MLP starts by
    predicting zero, with identity blocks.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = NOVATransformer(config)
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                # A patch layer is a linear one on flattened patches.
                nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
    for module in model.modules():
        if isinstance(module, Modulation):
            nn.init.zeros_(module.proj.weight)
    nn.init.zeros_(model.image_decoder.head.weight)
    return model


def new_vae(config: VAEConfig, seed: int = 0) -> CausalVideoVAE:
    """A float32 VAE with torch's own fresh weights; its global generator stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CausalVideoVAE(config)
