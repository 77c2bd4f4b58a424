"""The compiled module, and what every launch has in common."""

from types import ModuleType

import torch
from torch import Tensor

from nova_kernels import compiled

NAME = "nova_kernels._cuda"
DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}
# Tried once: torch.compile cannot trace an import.
_OBSTACLE = compiled.obstacle(NAME, "CUDA", "nvcc")


def obstacle() -> str | None:
    """Why there is no compiled module; None if there is."""
    return _OBSTACLE


def extension() -> ModuleType:
    """The compiled module.

    Raises:
        BackendError: it is not there.
    """
    return compiled.load(NAME, obstacle())


def dtype_of(module: ModuleType, dtype: torch.dtype) -> object:
    """The module's own word for a dtype."""
    return getattr(module.Dtype, DTYPES[dtype])


def stream_of(tensor: Tensor) -> int:
    """Address of the stream that work on a tensor belongs to; 0 on a CPU."""
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0
