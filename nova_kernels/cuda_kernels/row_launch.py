"""Launches of kernels of rows (csrc/rows.cuh)."""

from collections.abc import Mapping
from types import ModuleType

import torch
from torch import Tensor

from nova_kernels.checks import refuse_negating_views
from nova_kernels.cuda_kernels.extension import DTYPES, dtype_of, stream_of
from nova_kernels.dispatch import promoted
from nova_kernels.errors import BackendError
from nova_kernels.rows import MAX_WIDTH, as_rows

MAX_ROWS = 2**31 - 1


def in_one_dtype(op: str, *tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors of a call in the dtype that torch gives their sum, copied where they differ.

    Raises:
        BackendError: the kernels do not take the dtype, or the tensors lie on several devices.
    """
    dtype = promoted(*tensors)
    devices = {tensor.device for tensor in tensors if tensor is not None}
    if dtype not in DTYPES:
        names = [str(name).removeprefix("torch.") for name in DTYPES]
        raise BackendError(f"{op}: the CUDA kernels take {names}, got {dtype}")
    if len(devices) > 1:
        raise BackendError(f"{op}: the tensors lie on several devices: {sorted(map(str, devices))}")
    return [None if tensor is None else tensor.to(dtype) for tensor in tensors]


def launch_rows(
    module: ModuleType,
    name: str,
    struct: str,
    rows: Mapping[str, Tensor | None],
    others: Mapping[str, Tensor | float | None],
) -> dict[str, Tensor]:
    """Run a kernel over all rows.

    Args:
        module: the extension, or what stands in for it.
        name, struct: of the launch and of its arguments, in the module.
        rows: inputs and outputs of one dtype and one shape (..., width), by their names in the
            arguments; those that are None are left out.
        others: further arguments by name, contiguous tensors and numbers.

    Returns:
        `rows` without None, as the kernel got them: where two strides do not describe a tensor, a
        copy, into which an output went then.

    Raises:
        BackendError: rows are too wide or too many.
    """
    given = {key: tensor for key, tensor in rows.items() if tensor is not None}
    found = as_rows(*given.values())
    if found.width > MAX_WIDTH:
        raise BackendError(
            f"{name}: CUDA kernels of rows take widths up to {MAX_WIDTH}, got {found.width}; "
            "use backend='reference'"
        )
    if found.count > MAX_ROWS:
        raise BackendError(f"{name}: CUDA kernels take up to {MAX_ROWS} rows, got {found.count}")
    refuse_negating_views(name, *found.tensors)
    first = found.tensors[0]
    arguments = getattr(module, struct)()
    arguments.dtype = dtype_of(module, first.dtype)
    for key, value in {**found.arguments(*given), **others}.items():
        if isinstance(value, Tensor):
            value = value.data_ptr()
        if value is not None:
            setattr(arguments, key, value)
    if found.count > 0:
        with torch.cuda.device_of(first):
            getattr(module, name)(arguments, stream_of(first))
    return dict(zip(given, found.tensors, strict=True))
