"""uint8 frames -> what a VAE takes."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def to_pixels(clips: Sequence[np.ndarray]) -> Tensor:
    """Clips uint8 (T, H, W, 3) of equal shape -> float32 (B, 3, T, H, W) in [-1, 1]."""
    frames = torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3)
    return (frames.float() - 127.5) / 127.5
