"""x + gate * (LN(h) * weight + bias) in CUDA C++ (csrc/residual_norm.cuh).

The backward pass leaves sums of the gradients of weight and bias over strips of rows; torch adds
them, in an order that does not change.
"""

from types import ModuleType

import torch
from torch import Tensor

from nova_kernels.cuda_kernels.extension import extension
from nova_kernels.cuda_kernels.row_launch import in_one_dtype, launch_rows
from nova_kernels.dispatch import new_rows

# A strip's sums move about as many bytes as two of its rows, so long strips cost little; short ones
# keep more of a GPU busy. 1,000 rows make 125 strips of eight, 100,000 rows 1,563 of 64.
SHORTEST_STRIP, LONGEST_STRIP = 8, 64
STRIPS = 512  # wanted between them


def forward(
    x: Tensor,
    h: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    eps: float,
    out: Tensor,
    module: ModuleType | None = None,
) -> None:
    """See `nova_kernels.ops.residual_norm`; the result goes into out, which may be x.

    Args:
        x, h, gate, out: (..., width) of one shape; of several dtypes, copies in the promoted one
            are made.
        weight, bias: (width,), both or none.
        module: the extension, or what stands in for it.

    Raises:
        BackendError: there is no extension, or its kernels do not take these tensors.
    """
    module = module or extension()
    x, h, weight, bias, gate = in_one_dtype("residual_norm", x, h, weight, bias, gate)
    target = out if out.dtype == x.dtype else new_rows(out, x.dtype)
    rows = launch_rows(
        module,
        "residual_norm",
        "ResidualNormArguments",
        {"x": x, "h": h, "gate": gate, "out": target},
        {"weight": _contiguous(weight), "bias": _contiguous(bias), "eps": eps},
    )
    if rows["out"] is not out:
        out.copy_(rows["out"])


def backward(
    grad: Tensor,
    h: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    eps: float,
    module: ModuleType | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of h, weight, bias and gate; empty where these are not given.

    Arguments and errors as those of `forward`.
    """
    module = module or extension()
    h_dtype, weight_dtype, bias_dtype, gate_dtype = (
        None if t is None else t.dtype for t in (h, weight, bias, gate)
    )
    grad, h, weight, bias, gate = in_one_dtype("residual_norm", grad, h, weight, bias, gate)
    grad_h = new_rows(h)
    grad_gate = None if gate is None else new_rows(h)
    strip, sums = 1, (None, None)
    if weight is not None:
        width = h.shape[-1]
        num_rows = h.numel() // width
        strip = strip_length(num_rows)
        sums = h.new_empty(2, -(-num_rows // strip), width, dtype=torch.float32)
    launch_rows(
        module,
        "residual_norm_backward",
        "ResidualNormBackwardArguments",
        {"grad": grad, "h": h, "gate": gate, "grad_h": grad_h, "grad_gate": grad_gate},
        {
            "weight": _contiguous(weight),
            "bias": _contiguous(bias),
            "weight_sums": sums[0],
            "bias_sums": sums[1],
            "strip": strip,
            "eps": eps,
        },
    )
    none = grad.new_empty(0)
    return (
        grad_h.to(h_dtype),
        none if weight is None else sums[0].sum(0).to(weight_dtype),
        none.clone() if bias is None else sums[1].sum(0).to(bias_dtype),
        none.clone() if grad_gate is None else grad_gate.to(gate_dtype),
    )


def strip_length(num_rows: int) -> int:
    """Neighbouring rows whose gradients of weight and bias are added inside the kernel."""
    return min(max(num_rows // STRIPS, SHORTEST_STRIP), LONGEST_STRIP)


def _contiguous(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()
