"""Small encoded data sets and sources of clips, for the tests of training."""

import numpy as np
import torch

from nova.checkpoint import save_state_dict, write_json
from nova.data import Clip, ClipFormat, LatentDataset
from nova.data.shards import Shard, ShardIndex
from nova.errors import MediaError


def write_latents(folder, *, shape=(4, 3, 8, 8), count=8, text_dim=32, shards=2, seed=0):
    """A folder of random moments as `encode_clips` writes it; returns its data set."""
    generator = torch.Generator().manual_seed(seed)
    index = ShardIndex({}, shape, text_dim, scaling_factor=0.5, shift_factor=0.0)
    per_shard = count // shards
    for number in range(shards):
        mean = 2 * torch.randn(per_shard, *shape, generator=generator)
        tensors = {
            "mean": mean,
            "logvar": torch.full_like(mean, -6.0),
            "motion_flow": torch.rand(per_shard, generator=generator) * 5,
            "fps": torch.full((per_shard,), 12.0),
        }
        if text_dim is None:
            tensors["label"] = torch.randint(1000, (per_shard,), generator=generator)
        else:
            lengths = torch.randint(2, 7, (per_shard,), generator=generator)
            tensors["text"] = torch.randn(int(lengths.sum()), text_dim, generator=generator)
            tensors["text_offsets"] = torch.tensor([0, *lengths.tolist()]).cumsum(0)
        shard = Shard(f"shard-{number:05d}.safetensors", per_shard, 0, 0, [])
        save_state_dict(tensors, folder, f"shard-{number:05d}")
        captions = [f"clip {number * per_shard + row}" for row in range(per_shard)]
        write_json(folder / shard.captions_file, {"captions": captions})
        index = index.with_shard(shard, complete=number == shards - 1)
    index.write(folder)
    return LatentDataset(folder)


class GradientSource:
    """Clips of moving gradients, some of them unreadable.

    Args:
        size: number of clips.
        broken: indices that raise, as damaged files do.
        labels: class labels in place of captions.
    """

    def __init__(self, size, num_frames=5, height=32, width=32, broken=(), labels=False):
        self.format = ClipFormat(num_frames, height, width)
        self.size, self.broken, self.labels = size, frozenset(broken), labels
        self.reads = []

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        self.reads.append(index)
        if index in self.broken:
            raise MediaError(f"clip{index}.mp4 is damaged")
        wanted = self.format
        time, row, column = np.mgrid[: wanted.num_frames, : wanted.height, : wanted.width]
        grey = (8 * (row + index) + 4 * time) % 256
        frames = np.stack([grey, 255 - grey, 4 * column % 256], axis=-1).astype(np.uint8)
        caption = None if self.labels else f"gradient {index}"
        label = index if self.labels else None
        return Clip(f"clip{index}", frames, caption, label, float(index), wanted.fps)

    def describe(self):
        return {"kind": "gradients", "size": self.size, "format": self.format.to_dict()}
