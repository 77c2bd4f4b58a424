"""Checks of arguments that several ops share. Every message names the op."""

from torch import Tensor


def check_rows(op: str, x: Tensor) -> None:
    """Raises ValueError unless x is (..., width) with a width."""
    if x.dim() < 1 or x.shape[-1] == 0:
        raise ValueError(f"{op}: x needs a last axis of rows, got shape {tuple(x.shape)}")


def check_broadcast(op: str, name: str, tensor: Tensor, x: Tensor, x_name: str = "x") -> None:
    """Raises ValueError unless tensor has x's dtype and last axis, and broadcasts to its shape."""
    if tensor.dtype != x.dtype:
        raise ValueError(f"{op}: {name} has dtype {tensor.dtype}, {x_name} has {x.dtype}")
    sizes = zip(reversed(tensor.shape), reversed(x.shape), strict=False)
    fits = tensor.dim() <= x.dim() and all(a in (1, b) for a, b in sizes)
    if not fits or tensor.shape[-1:] != x.shape[-1:]:
        raise ValueError(
            f"{op}: {name} of shape {tuple(tensor.shape)} does not broadcast to the rows of "
            f"{x_name}, {tuple(x.shape)}"
        )
