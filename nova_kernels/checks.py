"""Checks of arguments that several ops share. Every message names the op."""

import torch
from torch import Tensor

from nova_kernels.errors import BackendError


def common_shape(op: str, **tensors: Tensor) -> torch.Size:
    """The shape (..., width) that tensors of rows broadcast to.

    Raises:
        ValueError: they do not broadcast, differ in width, or have no floating dtype.
    """
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{op}: {name} must have a floating dtype, got {tensor.dtype}")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    widths = {shape[-1] if shape else None for shape in shapes.values()}
    if len(widths) > 1 or widths & {0, None}:
        raise ValueError(f"{op}: tensors need one width, a last axis that is not empty: {shapes}")
    first, *others = shapes.values()
    if all(shape == first for shape in others):
        return next(iter(tensors.values())).shape  # broadcast_shapes is a loop in Python
    try:
        return torch.broadcast_shapes(*shapes.values())
    except RuntimeError:
        raise ValueError(f"{op}: shapes do not broadcast: {shapes}") from None


def check_writable(op: str, name: str, tensor: Tensor) -> None:
    """For in-place operations.

    Raises:
        ValueError: several elements of the tensor lie in one place, as after `expand`.
    """
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    if any(size > 1 and stride == 0 for size, stride in sizes):
        raise ValueError(f"{op}: several elements of {name} lie in one place; clone() it first")


def refuse_negating_views(name: str, *tensors: Tensor) -> None:
    """For kernels, which read memory as it is.

    Raises:
        BackendError: a tensor is a view that negates when it is read, as `x.conj().imag` is.
    """
    if any(tensor.is_neg() for tensor in tensors):
        raise BackendError(f"{name}: a tensor is a view that negates; call resolve_neg() on it")


def require_shape(op: str, name: str, tensor: Tensor, *shape: int) -> None:
    """Raises ValueError unless a tensor has the shape."""
    if tensor.shape != shape:
        raise ValueError(f"{op}: {name} must be {shape}, got {tuple(tensor.shape)}")
