"""Which errors say that a GPU's memory is short."""

import torch

# Messages of allocators beside torch's, which raise a plain RuntimeError.
_OUT_OF_GPU_MEMORY = (
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "Triton Error [CUDA]: out of memory",
    "cudaErrorMemoryAllocation",  # our own kernels in CUDA
)


def is_out_of_gpu_memory(error: Exception) -> bool:
    """Whether it was raised because a GPU's memory is short, by torch or somebody else."""
    return isinstance(error, torch.OutOfMemoryError) or says_out_of_gpu_memory(str(error))


def says_out_of_gpu_memory(text: str) -> bool:
    """The same for what an error says, where it is not a `torch.OutOfMemoryError`."""
    return any(message in text for message in _OUT_OF_GPU_MEMORY)
