"""The set loop's state: in which order a frame's tokens are revealed."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .layers import Rotary
from .model import NOVATransformer
from .noise import NoiseSource


@dataclass(frozen=True)
class TokenOrder:
    """The random order in which a frame's tokens are revealed, kept for all frames of a run.

    Tokens are held in this order throughout the set loop, so that "revealed", "set" and "masked"
    are slices; attention does not mind, since positions travel with the tokens.

    Attributes:
        order: (B, N) token index at every place.
        positions: (B, N, E) position table in this order; zeros (B, N, 1) with rotary.
        masked: (passes * B, N, E) mask token + positions.
        rotary: table of [condition, tokens in order] for all passes; None with absolute positions.
        passes: guidance passes.
    """

    order: Tensor
    positions: Tensor
    masked: Tensor
    rotary: Rotary | None
    passes: int

    @classmethod
    def draw(cls, model: NOVATransformer, noise: NoiseSource, passes: int) -> "TokenOrder":
        """Draw the order of every sample."""
        order = noise.uniform(model.config.num_image_tokens, 1).argsort(dim=1)[..., 0]
        table, angles = model.image_positions(), model.image_rotary()
        positions = model.mask_embed.mask_token.new_zeros(1, 1, 1).expand(*order.shape, 1)
        rotary = None
        if table is not None:
            positions = table[order]
        if angles is not None:
            cond = angles.new_zeros(len(order), model.config.num_frame_tokens, angles.shape[1])
            in_order = torch.cat([cond, angles[order]], dim=1).repeat(passes, 1, 1)
            rotary = Rotary.from_angles(in_order, model.dtype)
        masked = (model.mask_embed.mask_token + positions).expand(*order.shape, -1)
        masked = masked.repeat(passes, 1, 1)
        return cls(order, positions, masked, rotary, passes)

    def select(self, tokens: Tensor, start: int, stop: int) -> Tensor:
        """Tokens (B, N, d) in raster order -> those at places start..stop-1, (B, n, d)."""
        index = self.order[:, start:stop, None].expand(-1, -1, tokens.shape[-1])
        return tokens.gather(1, index)

    def outside(self, tokens: Tensor, start: int, stop: int) -> Tensor:
        """Tokens (B, N, d) in raster order -> those at all other places."""
        last = self.order.shape[1]
        return torch.cat([self.select(tokens, 0, start), self.select(tokens, stop, last)], dim=1)

    def to_raster(self, tokens: Tensor) -> Tensor:
        """Tokens (B, N, d) in this order -> raster order."""
        index = self.order[..., None].expand_as(tokens)
        return torch.empty_like(tokens).scatter_(1, index, tokens)
