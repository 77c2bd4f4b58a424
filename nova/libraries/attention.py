"""Attention without a mask, by any of the libraries that compute it."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from nova_kernels import block_causal_attention
from nova_kernels.dispatch import HAS_TRITON
from nova_kernels.errors import BackendError
from nova_kernels.out_of_memory import is_out_of_gpu_memory

from . import TORCH
from .packages import FLASH_ATTN, FLASH_ATTN_3, FLASH_ATTN_4, installed_packages


def sdpa(q: Tensor, k: Tensor, v: Tensor, kernel: SDPBackend) -> Tensor:
    """torch's attention by one of its kernels alone; see `attend`."""
    try:
        with sdpa_kernel(kernel):
            return F.scaled_dot_product_attention(q, k, v)
    except RuntimeError as error:  # what torch raises for other cards, dtypes and shapes
        if is_out_of_gpu_memory(error):
            raise
        raise BackendError(
            f"torch's attention kernel {kernel.name} cannot take {q.dtype} of shape "
            f"{tuple(q.shape)} on {q.device}: {error}"
        ) from error


def flash_attn_2(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The package flash-attn; see `attend`."""
    # Imported late: on a machine without CUDA such packages may be there and not importable.
    from flash_attn import flash_attn_func

    return _flash_attention(flash_attn_func, q, k, v)


def flash_attn_3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The package flash-attn-3, for Hopper; see `attend`."""
    if torch.compiler.is_compiling():  # which should not look into another compiler's code
        return F.scaled_dot_product_attention(q, k, v)
    from flash_attn_interface import flash_attn_func

    return _flash_attention(flash_attn_func, q, k, v)


def flash_attn_4(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The package flash-attn-4, for Hopper and later, compiled at the first call; see `attend`."""
    if torch.compiler.is_compiling():
        return F.scaled_dot_product_attention(q, k, v)
    from flash_attn.cute import flash_attn_func

    with torch.cuda.device_of(q):  # the current device's stream is where it runs
        return _flash_attention(flash_attn_func, q, k, v)


def _flash_attention(function: Callable, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise BackendError(f"FlashAttention takes float16 and bfloat16, not {q.dtype}")
    # It has tokens before heads.
    result = function(*(x.transpose(1, 2) for x in (q, k, v)))
    # Of some releases it gives the scores' log-sum-exp, too.
    out = result[0] if isinstance(result, tuple) else result
    return out.transpose(1, 2)


def triton(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """This package's kernel, all queries in one block; see `attend`."""
    # The order of keys does not matter: the last ones take the place of the block's own.
    earlier = k.shape[2] - q.shape[2]
    prefix = (k[:, :, :earlier], v[:, :, :earlier]) if earlier else None
    own = k[:, :, earlier:], v[:, :, earlier:]
    return block_causal_attention(q, *own, [q.shape[2]], prefix_kv=prefix, backend="triton")


LIBRARIES = {
    TORCH: F.scaled_dot_product_attention,  # by the kernel that torch chooses
    "flash": partial(sdpa, kernel=SDPBackend.FLASH_ATTENTION),
    "cudnn": partial(sdpa, kernel=SDPBackend.CUDNN_ATTENTION),
    "efficient": partial(sdpa, kernel=SDPBackend.EFFICIENT_ATTENTION),
    "math": partial(sdpa, kernel=SDPBackend.MATH),
    FLASH_ATTN: flash_attn_2,
    FLASH_ATTN_3: flash_attn_3,
    FLASH_ATTN_4: flash_attn_4,
    "triton": triton,
}


def attend(q: Tensor, k: Tensor, v: Tensor, library: str = TORCH) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v, of all queries and all keys.

    Args:
        q: (batch, heads, queries, head_dim).
        k, v: (batch, heads, keys, head_dim), no fewer keys than queries.
        library: one of `LIBRARIES`. In place of flash-attn-3 and flash-attn-4 torch.compile gets
            torch's.

    Returns:
        A tensor like q.

    Raises:
        BackendError: the library cannot compute it for this device, dtype or shape.
    """
    return LIBRARIES[library](q, k, v)


def installed_libraries(device: torch.device) -> tuple[str, ...]:
    """Those that there are for a device, torch's choice first; shapes may yet exclude some."""
    if device.type != "cuda":
        return (TORCH, "math")
    names = [TORCH, "flash", "cudnn", "efficient"]
    names += [name for name in installed_packages() if name in LIBRARIES]
    if HAS_TRITON:
        names.append("triton")
    return tuple(names)
