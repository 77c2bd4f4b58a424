"""Activation checkpointing: layers are computed again in the backward pass, to save memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from ..model import NOVATransformer


@contextmanager
def activation_checkpointing(model: NOVATransformer, level: int) -> Iterator[None]:
    """Inside, blocks keep their inputs alone for the backward pass; gradients stay the same.

    Args:
        level: 0 none, 1 the video encoder, 2 the image encoder too, 3 the diffusion MLP too.
    """
    parts = (model.video_encoder, model.image_encoder, model.image_decoder)[:level]
    blocks: list[nn.Module] = [block for part in parts for block in part.blocks]
    # torch.compile(block) has such an attribute of its own.
    before = [vars(block).get("forward") for block in blocks]
    for block in blocks:
        # An attribute of the object hides the method of its class; nothing in a block is random.
        block.forward = partial(
            checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
        )
    try:
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward
