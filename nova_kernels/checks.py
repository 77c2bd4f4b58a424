"""Checks of arguments that several ops share. Every message names the op."""

import torch
from torch import Tensor


def common_shape(op: str, **tensors: Tensor) -> torch.Size:
    """The shape (..., width) that tensors of rows broadcast to.

    Raises:
        ValueError: they do not broadcast, or differ in width.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    widths = {shape[-1] if shape else None for shape in shapes.values()}
    if len(widths) > 1 or widths & {0, None}:
        raise ValueError(f"{op}: tensors need one width, a last axis that is not empty: {shapes}")
    try:
        return torch.broadcast_shapes(*shapes.values())
    except RuntimeError:
        raise ValueError(f"{op}: shapes do not broadcast: {shapes}") from None
