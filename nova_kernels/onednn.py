"""Linear layers and convolutions on a CPU by oneDNN, which torch brings along.

torch's own linear layer is MKL's product in float32: it first copies the bias into the result,
takes the weight as it lies, and leaves an activation to a pass of its own. The operators called
here are those that torch.compile calls where weights are frozen; torch does not document them.
Convolutions of one small video torch leaves to a loop of its own instead of oneDNN, by a rule that
counts the elements of an image (`use_mkldnn` in ATen/native/Convolution.cpp).
"""

import platform
from functools import cache

import torch
from torch import Tensor, nn

_PLAIN, _GELU = ("none", [], ""), ("gelu", [], "none")  # "none" of GELU: not the tanh form


def is_usable(weight: Tensor) -> bool:
    """Whether a layer with this weight can be computed here: in float32, on an x86 CPU.

    `torch.backends.mkldnn.enabled = False` turns it off.
    """
    return weight.dtype == torch.float32 and _is_there(weight.device)


def can_pack(weight: Tensor) -> bool:
    """Whether `PackedLinear` takes this weight: where it `is_usable`, and in bfloat16 too."""
    if weight.dtype == torch.bfloat16:
        return has_half(weight.dtype) and _is_there(weight.device)
    return is_usable(weight)


def can_convolve(weight: Tensor) -> bool:
    """Whether `conv3d` takes this weight: where it `is_usable`, and in half precision.

    But not in half precision that oneDNN has, which torch leaves to it.
    """
    if weight.dtype in (torch.float16, torch.bfloat16):
        return not has_half(weight.dtype) and _is_there(weight.device)
    return is_usable(weight)


def _is_there(device: torch.device) -> bool:
    return (
        device.type == "cpu"
        and platform.machine().lower() in ("x86_64", "amd64")
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


@cache
def has_half(dtype: torch.dtype) -> bool:
    """Whether oneDNN computes in float16 or bfloat16 on this CPU (with AVX-512, or better)."""
    name = {torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    is_supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", None)
    return is_supported is not None and is_supported()


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`torch.nn.functional.linear` for a weight that `is_usable`, without a gradient."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias.contiguous(), *_PLAIN)


def conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: tuple[int, int, int],
    padding: tuple[int, int, int],
) -> Tensor:
    """`torch.nn.functional.conv3d`, without a gradient, for a weight that it `can_convolve`.

    Half precision is computed in float32 and rounded once. torch leaves it to a loop of its own,
    which took twenty times as long on an AMD EPYC without AVX-512.
    """
    inputs = x.float(), weight.float(), bias.float()
    return torch.mkldnn_convolution(*inputs, padding, stride, (1, 1, 1), 1).to(x.dtype)


class PackedLinear(nn.Module):
    """x @ weight.T + bias, maybe with the exact (erf) GELU of it, without a gradient.

    Args:
        weight: (out, in), see `can_pack`. It is copied, laid out as oneDNN reads it fastest, so
            later changes are not seen.
        bias: (out,) in the same dtype.
        gelu: whether GELU follows.
    """

    def __init__(self, weight: Tensor, bias: Tensor, *, gelu: bool = False):
        super().__init__()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
        self._bias = bias.detach().contiguous()  # its strides would be passed over
        self._activation = _GELU if gelu else _PLAIN

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) of any strides, in the dtype of the weight -> (..., out)."""
        return torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, *self._activation)
