"""Tensors of rows as kernels address them: two leading axes with a stride each."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Tensors of one shape (..., width) seen as (outer, inner, width), each with its strides.

    Attributes:
        tensors: the tensors; copied only where two strides cannot describe them.
        strides: (outer stride, inner stride) of every tensor, in elements; 0 where broadcast.
        outer, inner, width: sizes.
    """

    tensors: tuple[Tensor, ...]
    strides: tuple[tuple[int, int], ...]
    outer: int
    inner: int
    width: int

    @property
    def count(self) -> int:
        return self.outer * self.inner

    def arguments(self, *names: str) -> dict[str, Any]:
        """What kernels of rows take: num_rows, inner, width; name, name_outer, name_inner."""
        result: dict[str, Any] = {"num_rows": self.count, "inner": self.inner, "width": self.width}
        for name, tensor, (outer, inner) in zip(names, self.tensors, self.strides, strict=True):
            result |= {name: tensor, f"{name}_outer": outer, f"{name}_inner": inner}
        return result


def as_rows(*tensors: Tensor) -> Rows:
    """Bring tensors to the first one's shape, and find two axes that describe their rows.

    Args:
        tensors: (..., width); all but the first may be broadcast to its shape.

    Raises:
        ValueError: a tensor does not broadcast to the first one's shape.
    """
    shape = tensors[0].shape
    expanded = []
    for tensor in tensors:
        try:
            tensor = tensor.expand(shape)
        except RuntimeError:
            raise ValueError(
                f"shape {tuple(tensor.shape)} does not broadcast to {tuple(shape)}"
            ) from None
        expanded.append(tensor if tensor.stride(-1) == 1 else tensor.contiguous())
    axes = _merged_axes(expanded)
    if len(axes) > 2:
        expanded = [tensor.contiguous() for tensor in expanded]
        axes = _merged_axes(expanded)
    while len(axes) < 2:
        axes.insert(0, (1, (0,) * len(expanded)))
    (outer, outer_strides), (inner, inner_strides) = axes
    strides = tuple(zip(outer_strides, inner_strides, strict=True))
    return Rows(tuple(expanded), strides, outer, inner, shape[-1])


def _merged_axes(tensors: list[Tensor]) -> list[tuple[int, tuple[int, ...]]]:
    """(size, strides of the tensors) of leading axes; those that act as one axis are merged."""
    axes: list[tuple[int, tuple[int, ...]]] = []
    for axis in range(tensors[0].dim() - 1):
        size = tensors[0].shape[axis]
        strides = tuple(tensor.stride(axis) for tensor in tensors)
        if size == 1:
            continue
        if axes:
            before, before_strides = axes[-1]
            if all(b == s * size for b, s in zip(before_strides, strides, strict=True)):
                axes[-1] = (before * size, strides)
                continue
        axes.append((size, strides))
    return axes
