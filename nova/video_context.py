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
        """Read all given frames, possibly none, in one block-causal pass, and forget earlier ones.

        Returns:
            (passes * B, C, E) the image encoder's condition for the next frame.
        """
        self.num_seen = 1 + len(frames)
        return self._read(torch.stack(frames, 2) if frames else None, 0, self.num_seen)

    def advance(self, latents: Tensor) -> Tensor:
        """Read the frame (B, channels, h, w) that was just finished; returns as `start`."""
        t = self.num_seen
        self.num_seen = t + 1
        return self._read(latents[:, :, None], t, t + 1)

    def close(self) -> None:
        """End of the run."""

    def _read(self, latents: Tensor | None, start: int, stop: int) -> Tensor:
        """The pass over the inputs start .. stop - 1 of the video encoder.

        The input of frame 0 is the prompt and the bos token, that of frame t the frame before, from
        `latents` (B, channels, frames, h, w). A pass over the same inputs can be repeated.
        """
        model, prefix = self._model, self._conditioning.tokens
        per_frame = model.config.num_frame_tokens
        inputs, blocks = [], [per_frame] * (stop - start)
        if start == 0:
            inputs.append(model.embed_first_frame(self._conditioning.batch_size, self._slice(0, 1)))
            blocks[0] += prefix.shape[1]
        if latents is not None:
            inputs.append(model.embed_frames(latents, self._slice(stop - latents.shape[2], stop)))
        x = self._expand(torch.cat(inputs, dim=1)).flatten(1, 2)
        if start == 0:
            x = torch.cat([prefix, x], dim=1)
        out = model.encode_video(
            x,
            rotary=self._rotary(start, stop),
            # Where nothing follows, nobody reads them.
            caches=None if start == 0 and stop == self._num_frames else self._caches_before(start),
            block_lengths=blocks,
        )
        if start == 0:
            self._keep_first(out[:, prefix.shape[1] :][:, :per_frame])
        return self._first if stop == 1 else model.mix(self._first, out[:, -per_frame:])

    def _caches_before(self, start: int) -> list[KeyValueCache]:
        """Caches that hold the inputs before `start`, with room for all."""
        in_front = self._conditioning.tokens.shape[1]
        per_frame = self._model.config.num_frame_tokens
        if self._caches is None:
            length = in_front + per_frame * self._num_frames
            self._caches = [KeyValueCache(length) for _ in self._model.video_encoder.blocks]
        for cache in self._caches:
            cache.rewind(in_front + per_frame * start if start else 0)
        return self._caches

    def _keep_first(self, features: Tensor) -> None:
        if self._first is None:
            self._first = torch.empty_like(features)
        self._first.copy_(features)

    def _slice(self, start: int, stop: int) -> Tensor | None:
        return None if self._positions is None else self._positions[start:stop]

    def _rotary(self, start: int, stop: int) -> Rotary | None:
        if self._angles is None:
            return None
        per_frame = self._model.config.num_frame_tokens
        angles = self._angles[start * per_frame : stop * per_frame]
        if start == 0:
            # Prefix tokens are at position 0.
            prefix = self._conditioning.tokens.shape[1]
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
