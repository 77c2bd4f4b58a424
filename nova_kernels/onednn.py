"""Linear layers and convolutions on a CPU by oneDNN, which torch brings along.

torch's own linear layer is MKL's product in float32: it first copies the bias into the result,
takes the weight as it lies, and leaves an activation to a pass of its own. On an AMD CPU with
AVX-512 oneDNN is faster all the same; without AVX-512, and on an Intel CPU with it, MKL is. The
operators called here are those that torch.compile calls where weights are frozen; torch does not
document them.
Convolutions of one small video torch leaves to a loop of its own instead of oneDNN, by a rule that
counts the elements of an image (`use_mkldnn` in ATen/native/Convolution.cpp).
"""

import platform
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nova_kernels.openmp import gives_all_threads

# Half precision, and what oneDNN calls it.
_HALF = {torch.float16: "fp16", torch.bfloat16: "bf16"}
_PLAIN, _GELU = ("none", [], ""), ("gelu", [], "none")  # "none" of GELU: not the tanh form


def is_usable(weight: Tensor) -> bool:
    """Whether `linear` and `conv3d` take this weight: in float32 or half precision, on an x86 CPU.

    But not in half precision that oneDNN has, which torch leaves to it. And
    `torch.backends.mkldnn.enabled = False` turns it off.
    """
    dtype = weight.dtype
    is_taken = not _has(dtype) if dtype in _HALF else dtype == torch.float32
    return is_taken and _is_there(weight.device)


def can_pack(weight: Tensor) -> bool:
    """Whether `PackedLinear` gains something.

    On an x86 CPU it does in bfloat16, in float16 that oneDNN lacks, and in float32 where oneDNN
    `multiplies_faster`.
    """
    if weight.dtype == torch.float32:
        return is_usable(weight) and multiplies_faster()
    return is_usable(weight) or (weight.dtype == torch.bfloat16 and _is_there(weight.device))


@cache
def multiplies_faster() -> bool:
    """Whether oneDNN's products in float32 are faster than those of MKL, or torch has no MKL.

    And right: they are not where OpenMP gives fewer threads than torch asks for.
    """
    if not gives_all_threads():
        return False
    if not torch.backends.mkl.is_available():
        return True
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512") and not _is_from_intel()


def _is_from_intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux, or closed off
        return False


def _is_there(device: torch.device) -> bool:
    return (
        device.type == "cpu"
        and platform.machine().lower() in ("x86_64", "amd64")
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


@cache
def _has(dtype: torch.dtype) -> bool:
    """Whether oneDNN computes in float16 or bfloat16 on this CPU (with AVX-512, or better)."""
    is_supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{_HALF[dtype]}_supported", None)
    return is_supported is not None and is_supported()


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`torch.nn.functional.linear` for a weight that `is_usable`, without a gradient.

    Half precision is computed in float32 and rounded once.
    """
    given = x.float(), weight.float(), bias.float().contiguous()
    if not multiplies_faster():
        return F.linear(*given).to(x.dtype)
    return torch.ops.mkldnn._linear_pointwise(*given, *_PLAIN).to(x.dtype)


def conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: tuple[int, int, int],
    padding: tuple[int, int, int],
) -> Tensor:
    """`torch.nn.functional.conv3d` for a weight that `is_usable`, without a gradient.

    Half precision is computed in float32 and rounded once: torch leaves it to a slow loop.
    """
    given = x.float(), weight.float(), bias.float()
    return torch.mkldnn_convolution(*given, padding, stride, (1, 1, 1), 1).to(x.dtype)


class PackedLinear(nn.Module):
    """x @ weight.T + bias, maybe with the exact (erf) GELU of it, without a gradient.

    Half precision that oneDNN lacks is computed in float32 and rounded once. Float32 is computed by
    oneDNN or MKL, whichever is faster.

    Args:
        weight: (out, in), in float32 or see `can_pack`. It is copied, laid out as its library reads
            it fastest, so later changes are not seen.
        bias: (out,) in the same dtype.
        gelu: whether GELU follows.
    """

    def __init__(self, weight: Tensor, bias: Tensor, *, gelu: bool = False):
        super().__init__()
        lacks = weight.dtype in _HALF and not _has(weight.dtype)
        self._dtype = torch.float32 if lacks else weight.dtype
        self._gelu = gelu
        self._by_mkl = self._dtype == torch.float32 and not multiplies_faster()
        weight = weight.detach().to(self._dtype, copy=True)
        self._weight = (
            weight.contiguous() if self._by_mkl else torch.ops.mkldnn._reorder_linear_weight(weight)
        )
        # Its strides would be passed over.
        self._bias = bias.detach().to(self._dtype).contiguous()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) of any strides, in the dtype of the weight -> (..., out)."""
        given = x.to(self._dtype), self._weight, self._bias
        if self._by_mkl:
            out = F.linear(*given)
            out = torch.ops.aten.gelu_(out) if self._gelu else out
        else:
            out = torch.ops.mkldnn._linear_pointwise(*given, *(_GELU if self._gelu else _PLAIN))
        return out.to(x.dtype)
