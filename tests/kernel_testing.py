"""What the tests of ops share: devices, poisoned memory, and the rule for a kernel's error."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, library

from nova_kernels.cuda_kernels import extension
from nova_kernels.dispatch import HAS_TRITON

# On a GPU the kernels run as they are; elsewhere Triton's interpreter runs them (conftest.py).
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter rounds bfloat16 wrongly.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
needs_extension = pytest.mark.skipif(
    DEVICE == "cpu" or extension.obstacle() is not None,
    reason="needs a GPU and the CUDA extension",
)
# Of ops that are written in both.
TRITON_AND_CUDA = [
    pytest.param("triton", marks=needs_triton),
    pytest.param("cuda", marks=needs_extension),
]

opcheck = library.opcheck  # PyTorch's own test of an operator's registration

# Smallest error that counts, relative to the result's norm.
FLOORS = {torch.float32: 1e-6, torch.float16: 2e-4, torch.bfloat16: 2e-3}


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal numbers, the same on every device, exact in `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Inside, memory of torch.empty and the like holds NaN, so that what is not written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def relative_error(result: Tensor, exact: Tensor) -> float:
    """||result - exact|| / ||exact||; NaN and infinity count as infinite."""
    result, exact = result.detach().double(), exact.detach()
    difference = (result - exact).norm() / exact.norm().clamp(min=1e-30)
    return float(difference.nan_to_num(torch.inf))


def assert_as_exact_as_torch(
    result: Tensor, plain: Tensor, exact: Tensor, rounding: float = 0.0
) -> None:
    """A kernel's error is at most twice that of plain torch in the same dtype.

    Args:
        result: the kernel's.
        plain: plain torch's, in the same dtype.
        exact: the same in float64.
        rounding: relative error that the kernel may have beyond that, of a rounding that torch does
            not do.
    """
    assert result.shape == exact.shape and result.dtype == plain.dtype
    error, of_torch = relative_error(result, exact), relative_error(plain, exact)
    allowed = 2 * of_torch + FLOORS[plain.dtype] + rounding
    assert error <= allowed, f"{error} against torch's {of_torch}"


def in_float64(*tensors: Tensor | None) -> list[Tensor | None]:
    """Copies in float64, as leaves that ask for gradients where the originals do."""
    return [
        None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in tensors
    ]
