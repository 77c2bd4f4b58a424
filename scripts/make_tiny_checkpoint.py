"""Make a small checkpoint folder with random weights, in the format of the released ones.

    python scripts/make_tiny_checkpoint.py build/tiny-nova

The tests sample from it. Its videos show nothing; that they come out is the point.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from tiny_text_encoder import make_tiny_text_encoder

from nova.codec import LatentCodec
from nova.config import named_config
from nova.model import NOVATransformer
from nova.pipeline import NOVAPipeline
from nova.schedule import FlowMatchConfig
from nova.text import TextEncoder
from nova.vae import CausalVideoVAE, VAEConfig

# Fewer channels than the smallest one that is worth training: most tests decode.
VAE_CONFIG = replace(VAEConfig.tiny(), block_out_channels=(8, 8, 16, 16), norm_num_groups=4)


def make_tiny_checkpoint(folder: Path, size: str = "tiny-video", seed: int = 0) -> Path:
    """Write a whole checkpoint folder of a named size (`nova.config.NAMED_CONFIGS`)."""
    torch.manual_seed(seed)
    config = named_config(size)
    transformer = NOVATransformer(config)
    vae = CausalVideoVAE(VAE_CONFIG)
    text_encoder = None
    if config.text_token_dim:
        folders = make_tiny_text_encoder(folder, hidden_size=config.text_token_dim, seed=seed)
        text_encoder = TextEncoder.from_folders(*folders, max_length=config.text_token_len)
    pipeline = NOVAPipeline(transformer, FlowMatchConfig(), LatentCodec(vae), text_encoder)
    pipeline.save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", default="tiny-video", help="a size of nova.config.NAMED_CONFIGS")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(f"wrote {make_tiny_checkpoint(arguments.folder, arguments.size, arguments.seed)}")


if __name__ == "__main__":
    main()
