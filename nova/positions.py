"""Position tables and frequency embeddings: pure functions, computed in float32.

Formulas: docs/model.md (they are NOVA's; sin-cos tables as in MAE, rotary pairs as in RoFormer).
"""

import torch
from torch import Tensor

NUM_FREQUENCIES = 128
THETA = 10000.0


def _powers(count: int, device: torch.device | None = None) -> Tensor:
    """(count,): 1 / THETA^(k / count)."""
    exponent = torch.arange(count, dtype=torch.float32, device=device) / count
    return 1.0 / THETA**exponent


def sincos_2d(height: int, width: int, dim: int, device: torch.device | None = None) -> Tensor:
    """(height * width, dim) table, row-major: [sin w, cos w, sin h, cos h] of dim / 4 each."""
    frequencies = _powers(dim // 4, device)
    rows = torch.arange(height, dtype=torch.float32, device=device)
    columns = torch.arange(width, dtype=torch.float32, device=device)
    h = (rows[:, None] * frequencies).repeat_interleave(width, dim=0)
    w = (columns[:, None] * frequencies).repeat(height, 1)
    return torch.cat([w.sin(), w.cos(), h.sin(), h.cos()], dim=-1)


def sincos_1d(values: Tensor) -> Tensor:
    """(..., 256) of [sin, cos] for values of any shape: frame times, motion scores, rates."""
    angles = values.float()[..., None] * _powers(NUM_FREQUENCIES, values.device)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def timestep_features(timesteps: Tensor) -> Tensor:
    """(..., 256) of [cos, sin] for diffusion timesteps in 0..1000.

    The same frequencies as `sincos_1d`, written exp(-ln(THETA) k / 128), with cosines first.
    """
    sin, cos = sincos_1d(timesteps).chunk(2, dim=-1)
    return torch.cat([cos, sin], dim=-1)


def frame_times(num_frames: int, time_base: int, device: torch.device | None = None) -> Tensor:
    """(num_frames,): t * (time_base / num_frames), the grid of the absolute time embedding."""
    grid = torch.arange(num_frames, dtype=torch.float32, device=device)
    return grid / (num_frames / time_base)


def rotary_angles(
    num_frames: int, height: int, width: int, head_dim: int, device: torch.device | None = None
) -> Tensor:
    """(num_frames * height * width, head_dim / 2): angle of every interleaved pair (2k, 2k + 1).

    head_dim / 8 of the head goes to time, the rest in halves to rows and columns.
    """
    time_dim = head_dim // 8
    axis_dims = (time_dim, (head_dim - time_dim) // 2, (head_dim - time_dim) // 2)
    sizes = (num_frames, height, width)
    indices = torch.meshgrid(
        *(torch.arange(n, dtype=torch.float32, device=device) for n in sizes), indexing="ij"
    )
    angles = []
    for index, dim in zip(indices, axis_dims, strict=True):
        exponent = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
        angles.append(index.reshape(-1, 1) / THETA**exponent)
    return torch.cat(angles, dim=-1)
