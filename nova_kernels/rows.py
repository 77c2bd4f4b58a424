"""Tensors of rows as kernels address them: two leading axes with a stride each."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

# The widest rows that the kernels hold.
MAX_WIDTH = 8192


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
    """Find two axes that describe the rows of tensors of one shape (..., width).

    Raises:
        ValueError: their shapes differ, and a kernel would read beyond them.
    """
    if len({tensor.shape for tensor in tensors}) > 1:
        raise ValueError(f"rows of different shapes: {[tuple(t.shape) for t in tensors]}")
    width = tensors[0].shape[-1]
    if tensors[0].numel() == 0:
        return Rows(tensors, ((0, 0),) * len(tensors), 0, 1, width)
    strided = [tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in tensors]
    axes = _merged_axes(strided)
    if len(axes) > 2:
        strided = [tensor.contiguous() for tensor in strided]
        axes = _merged_axes(strided)
    while len(axes) < 2:
        axes.insert(0, (1, (0,) * len(strided)))
    (outer, outer_strides), (inner, inner_strides) = axes
    strides = tuple(zip(outer_strides, inner_strides, strict=True))
    return Rows(tuple(strided), strides, outer, inner, width)


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
