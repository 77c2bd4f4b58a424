"""The compiled module, and what every launch has in common."""

import importlib
from types import ModuleType

import torch
from torch import Tensor

from nova_kernels.errors import BackendError

NAME = "nova_kernels._cuda"
DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}


def obstacle() -> str | None:
    """Why there is no compiled module; None if there is."""
    try:
        importlib.import_module(NAME)
    except ImportError as error:
        return (
            f"the CUDA extension is not there ({error}); install nova-kernels where nvcc is found, "
            "and see python -m nova_kernels --build"
        )
    return None


def extension() -> ModuleType:
    """The compiled module.

    Raises:
        BackendError: it is not there.
    """
    reason = obstacle()
    if reason is not None:
        raise BackendError(reason)
    return importlib.import_module(NAME)


def dtype_of(module: ModuleType, dtype: torch.dtype) -> object:
    """The module's own word for a dtype."""
    return getattr(module.Dtype, DTYPES[dtype])


def stream_of(tensor: Tensor) -> int:
    """Address of the stream that work on a tensor belongs to; 0 on a CPU."""
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0
