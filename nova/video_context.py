"""The frame loop's state: what the video encoder has seen."""

import torch
from torch import Tensor

from .conditioning import Conditioning
from .guidance import Guidance
from .layers import KeyValueCache, Rotary
from .model import NOVATransformer


class VideoContext:
    """State of the frame loop: caches, position tables, frame 0's features.

    Args:
        num_frames: frames that this context will see in all.
    """

    def __init__(
        self,
        model: NOVATransformer,
        conditioning: Conditioning,
        guidance: Guidance,
        num_frames: int,
    ):
        self.num_seen = 0
        self._model = model
        self._conditioning = conditioning
        self._guidance = guidance
        self._num_frames = num_frames
        self._positions = model.video_positions(num_frames)
        self._angles = model.video_rotary(num_frames)
        self._caches: list[KeyValueCache] | None = None
        self._first: Tensor | None = None

    def start(self, frames: list[Tensor]) -> Tensor:
        """Read all given frames, possibly none, in one block-causal pass.

        Returns:
            (passes * B, C, E) the image encoder's condition for the next frame.
        """
        model, prefix = self._model, self._conditioning.tokens
        batch, frame_tokens = self._conditioning.batch_size, model.config.num_frame_tokens
        tokens = model.embed_first_frame(batch, self._slice(0, 1))
        if frames:
            later = model.embed_frames(torch.stack(frames, 2), self._slice(1, 1 + len(frames)))
            tokens = torch.cat([tokens, later], dim=1)
        if self._num_frames > 1 + len(frames):
            length = prefix.shape[1] + frame_tokens * self._num_frames
            depth = len(model.video_encoder.blocks)
            self._caches = [KeyValueCache(length) for _ in range(depth)]
        blocks = [prefix.shape[1] + frame_tokens] + [frame_tokens] * len(frames)
        x = torch.cat([prefix, self._expand(tokens).flatten(1, 2)], dim=1)
        rotary = self._rotary(0, 1 + len(frames), prefix.shape[1])
        out = model.encode_video(x, rotary=rotary, caches=self._caches, block_lengths=blocks)
        self.num_seen = 1 + len(frames)
        self._first = out[:, prefix.shape[1] :][:, :frame_tokens]
        return model.mix(self._first, out[:, -frame_tokens:]) if frames else self._first

    def advance(self, latents: Tensor) -> Tensor:
        """Read the frame (B, channels, h, w) that was just finished; returns as `start`."""
        t = self.num_seen
        tokens = self._model.embed_frames(latents[:, :, None], self._slice(t, t + 1))
        x = self._expand(tokens).flatten(1, 2)
        out = self._model.encode_video(x, rotary=self._rotary(t, t + 1), caches=self._caches)
        self.num_seen = t + 1
        return self._model.mix(self._first, out)

    def _slice(self, start: int, stop: int) -> Tensor | None:
        return None if self._positions is None else self._positions[start:stop]

    def _rotary(self, start: int, stop: int, prefix: int = 0) -> Rotary | None:
        if self._angles is None:
            return None
        per_frame = self._model.config.num_frame_tokens
        angles = self._angles[start * per_frame : stop * per_frame]
        # Prefix tokens are at position 0.
        angles = torch.cat([angles.new_zeros(prefix, angles.shape[1]), angles])
        return Rotary.from_angles(angles, self._model.dtype)

    def _expand(self, tokens: Tensor) -> Tensor:
        """(B, T, C, E) -> (passes * B, T, C, E)."""
        tokens = tokens.repeat(self._guidance.passes, 1, 1, 1)
        if self._guidance.passes == 3:
            # Under image guidance the unconditional pass sees no frame at all: the bare bos token.
            batch = self._conditioning.batch_size
            tokens[batch : 2 * batch] = self._model.mask_embed.bos_token
        return tokens
