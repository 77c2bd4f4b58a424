"""Training data: sources of captioned clips, and latents of them in shards.

A source gives clips (`FolderSource`, `ShapesSource`); `encode_clips` turns them into text
embeddings and VAE posteriors once; `LatentDataset` reads those, so that training sees no pixels.
"""

from .clips import Clip, ClipFormat, ClipSource
from .dataset import LatentDataset, LatentSample
from .encoding import encode_clips
from .folder import FolderSource
from .order import ShuffledOrder, split_step
from .shapes_source import ShapesSource

__all__ = [
    "Clip",
    "ClipFormat",
    "ClipSource",
    "FolderSource",
    "LatentDataset",
    "LatentSample",
    "ShapesSource",
    "ShuffledOrder",
    "encode_clips",
    "split_step",
]
