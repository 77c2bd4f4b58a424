"""Open-Sora-Plan's causal video VAE: whole, tile by tile, frame by frame, or as a stream."""

from .autoencoder import CausalVideoVAE, sample_latents
from .config import VAEConfig
from .stream import StreamingDecoder

__all__ = ["CausalVideoVAE", "StreamingDecoder", "VAEConfig", "sample_latents"]
