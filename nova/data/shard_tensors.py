"""The tensors of a shard, made while its clips come in."""

import numpy as np
import torch
from torch import Tensor

from ..codec import LatentCodec, to_pixels
from ..errors import CheckpointError, InputError
from ..text import TextEncoder
from .clips import Clip


class ShardTensors:
    """Collects clips; their frames, the bulk of them, no longer than until they are encoded.

    Args:
        text_encoder: for captions; None for class labels.
        batch_size: clips that go through the VAE at a time.
        dtype: what moments and embeddings are stored in.

    Attributes:
        captions: of the clips so far, or their classes as text.
    """

    def __init__(
        self,
        codec: LatentCodec,
        text_encoder: TextEncoder | None,
        batch_size: int,
        dtype: torch.dtype,
    ):
        self._codec, self._text_encoder = codec, text_encoder
        self._batch_size, self._dtype = batch_size, dtype
        self.captions: list[str] = []
        self._frames: list[np.ndarray] = []
        self._means: list[Tensor] = []
        self._logvars: list[Tensor] = []
        self._labels: list[int | None] = []
        self._motion_flows: list[float] = []
        self._rates: list[float] = []

    def __len__(self) -> int:
        return len(self.captions)

    def add(self, clip: Clip) -> None:
        """Take a clip, and encode those that wait when they are a batch.

        Raises:
            CheckpointError: latents are not finite.
            InputError: they do not fit the dtype.
        """
        self.captions.append(f"class {clip.label}" if clip.caption is None else clip.caption)
        self._labels.append(clip.label)
        self._motion_flows.append(clip.motion_flow)
        self._rates.append(clip.fps)
        self._frames.append(clip.frames)
        if len(self._frames) == self._batch_size:
            self._encode_frames()

    def finish(self) -> dict[str, Tensor]:
        """All tensors by name, on the CPU; there must be a clip.

        Raises:
            CheckpointError, InputError: see `add`; of embeddings too.
        """
        if self._frames:
            self._encode_frames()
        tensors = {
            "mean": torch.cat(self._means),
            "logvar": torch.cat(self._logvars),
            "motion_flow": torch.tensor(self._motion_flows, dtype=torch.float32),
            "fps": torch.tensor(self._rates, dtype=torch.float32),
        }
        if self._text_encoder is None:
            return {**tensors, "label": torch.tensor(self._labels)}
        embeddings = self._text_encoder.encode(self.captions)
        lengths = torch.tensor([0, *(len(embedding) for embedding in embeddings)])
        text = _stored(torch.cat(embeddings), self._dtype, "text embeddings")
        return {**tensors, "text": text, "text_offsets": lengths.cumsum(0)}

    def _encode_frames(self) -> None:
        mean, logvar = self._codec.encode_moments(to_pixels(self._frames))
        self._means.append(_stored(mean, self._dtype, "latents"))
        self._logvars.append(_stored(logvar, self._dtype, "latents"))
        self._frames = []


def _stored(x: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    x = x.cpu()
    if not x.isfinite().all():
        raise CheckpointError(f"{name} are NaN or infinite; encode in float32 or bfloat16")
    stored = x.to(dtype)
    if not stored.isfinite().all():
        raise InputError(f"{name} exceed the range of float16; store them in bfloat16")
    return stored
