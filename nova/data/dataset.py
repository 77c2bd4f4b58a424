"""Encoded clips on disk as a data set: rows are read one by one from memory-mapped files."""

import os
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset

from ..checkpoint import expand_home, read_json
from ..errors import CheckpointError, InputError
from ..numeric import checked_count
from ..vae import sample_latents
from .shards import INDEX_NAME, ShardIndex


@dataclass(frozen=True)
class LatentSample:
    """One encoded clip.

    Attributes:
        mean, logvar: float32 (C, T, h, w), the VAE's posterior, not scaled.
        text: float32 (tokens, width) embeddings of the caption; None in data of class labels.
        label: the class; None in captioned data.
        motion_flow, fps: of the clip.
    """

    mean: Tensor
    logvar: Tensor
    text: Tensor | None
    label: int | None
    motion_flow: float
    fps: float


class LatentDataset(Dataset):
    """The folder that `encode_clips` writes.

    Nothing is unpickled. Files are mapped into memory when they are first read, in every worker
    process for itself.

    Args:
        max_latent_length: so many latent frames from the start of every clip; None: all.

    Attributes:
        index: the folder's `ShardIndex`.
        latent_shape: (C, T, h, w) of every sample.

    Raises:
        InputError: no such folder, an unfinished one, one without samples, or no frame to read.
        CheckpointError: the index is damaged, a shard is missing, or ~ of a user that there is not.
    """

    def __init__(self, folder: str | os.PathLike, *, max_latent_length: int | None = None):
        self.folder = expand_home(folder)
        length = max_latent_length
        if length is not None:
            length = checked_count("max_latent_length", length, least=1)
        if not (self.folder / INDEX_NAME).is_file():
            raise InputError(
                f"{self.folder} has no {INDEX_NAME}; make encoded data with: nova encode"
            )
        self.index = ShardIndex.read(self.folder)
        if not self.index.complete:
            raise InputError(f"{self.folder} is unfinished; run the same nova encode again")
        shards = [shard for shard in self.index.shards if shard.samples]
        missing = [s.file for s in shards if not (self.folder / s.file).is_file()]
        if missing:
            raise CheckpointError(f"{self.folder} lacks the shards {missing[:6]}; encode again")
        channels, frames, *size = self.index.latent_shape
        self.latent_shape = (channels, min(frames, length or frames), *size)
        self._shards = shards
        self._ends = list(accumulate(shard.samples for shard in shards))
        if not shards:
            raise InputError(f"{self.folder} has no samples; see its list of skipped files")
        self._files: dict[str, Any] = {}

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> LatentSample:
        """Sample `index`, which may come from any shard."""
        shard, row = self._locate(index)
        file = self._open(shard.file)
        try:
            mean, logvar = (
                file.get_slice(name)[row, :, : self.latent_shape[1]].float()
                for name in ("mean", "logvar")
            )
            text, label = None, None
            if self.index.text_dim is None:
                label = int(file.get_slice("label")[row])
            else:
                start, stop = file.get_slice("text_offsets")[row : row + 2].tolist()
                text = file.get_slice("text")[start:stop].float()
            flow = float(file.get_slice("motion_flow")[row])
            fps = float(file.get_slice("fps")[row])
        except SafetensorError as error:
            raise CheckpointError(f"{self.folder / shard.file} is damaged: {error}") from None
        return LatentSample(mean, logvar, text, label, flow, fps)

    def scale(self, latents: Tensor) -> Tensor:
        """The VAE's own latents to those that a model is trained on."""
        return (latents - self.index.shift_factor) * self.index.scaling_factor

    def draw_latents(self, sample: LatentSample, generator: torch.Generator) -> Tensor:
        """Scaled latents (C, T, h, w), drawn from a sample's posterior."""
        return self.scale(sample_latents(sample.mean[None], sample.logvar[None], generator)[0])

    def caption(self, index: int) -> str:
        """Caption of sample `index`, or its class as text."""
        shard, row = self._locate(index)
        return read_json(self.folder / shard.captions_file)["captions"][row]

    def longest_caption(self) -> int:
        """Tokens of the longest caption; 0 in data of class labels.

        Raises:
            CheckpointError: a shard is damaged.
        """
        if self.index.text_dim is None:
            return 0
        longest = 0
        for shard in self._shards:
            try:
                # The embeddings themselves are not read.
                offsets = self._open(shard.file).get_tensor("text_offsets")
            except SafetensorError as error:
                raise CheckpointError(f"{self.folder / shard.file} is damaged: {error}") from None
            longest = max(longest, int(offsets.diff().max()))
        return longest

    def _locate(self, index: int):
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number = bisect_right(self._ends, index)
        return self._shards[number], index - (self._ends[number - 1] if number else 0)

    def _open(self, name: str) -> Any:
        if name not in self._files:
            try:
                self._files[name] = safe_open(self.folder / name, framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{self.folder / name} is damaged: {error}") from None
        return self._files[name]

    def __getstate__(self) -> dict[str, Any]:
        # Open files stay in their process.
        return {**self.__dict__, "_files": {}}
