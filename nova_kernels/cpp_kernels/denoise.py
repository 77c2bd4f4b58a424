"""All steps of the denoise loop in one call on a CPU (csrc/cpp/denoise.h).

The kernel computes in float32. Tensors in half precision are converted before the loop and rounded
once, behind it, which takes far less time than a sequence of torch's operators.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nova_kernels import onednn
from nova_kernels.cpp_kernels.extension import extension
from nova_kernels.head_weights import HeadWeights, Linear
from nova_kernels.openmp import openmp_parallel
from nova_kernels.ops.denoise import Outside
from nova_kernels.ops.diffusion_step import StepCoefficients

DTYPES = {torch.float32, torch.float16, torch.bfloat16}


def obstacle(
    x: Tensor,
    condition: Tensor,
    weights: HeadWeights,
    steps: Sequence[StepCoefficients],
    outside: Outside | None,
) -> str | None:
    """Why the kernel cannot run a call of `nova_kernels.denoise`; None if it can."""
    dtypes = {tensor.dtype for tensor in (x, condition, *weights.tensors())}
    if len(dtypes) > 1 or not dtypes <= DTYPES:
        taken = "float32, float16 or bfloat16 for all tensors"
        return f"it takes {taken}, got {sorted(map(str, dtypes))}"
    if any(step.renorm < 1 for step in steps):
        return "renormalised guidance needs a sequence of calls"
    return None


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The layers whose products are made before the loop, in float32."""
    if onednn.is_usable(weight):
        return onednn.linear(x, weight, bias).float()
    return F.linear(x, weight, bias).float()


def pack(weights: HeadWeights, kernel: int = 0) -> dict[str, Any]:
    """The weights in panels of neighbouring outputs, as a kernel of the extension reads them."""
    _, panel = extension().kernels()[kernel]
    return {
        "embed": _pack_linear(weights.embed, panel),
        "head": _pack_linear(weights.head, panel),
        "blocks": [
            {
                "fc1": _pack_linear(block.fc1, panel),
                "fc2": _pack_linear(block.fc2, panel),
                "norm": tuple(_as_read(tensor).contiguous() for tensor in block.norm),
            }
            for block in weights.blocks
        ],
    }


def _pack_linear(linear: Linear, panel: int) -> Linear:
    """(outputs, inputs) -> (outputs / panel, inputs, panel), with zeros up to whole panels."""
    weight, bias = map(_as_read, linear)
    missing = -len(bias) % panel
    panels = F.pad(weight, (0, 0, 0, missing)).unflatten(0, (-1, panel)).transpose(1, 2)
    return panels.contiguous(), F.pad(bias, (0, missing)).contiguous()


def _as_read(tensor: Tensor) -> Tensor:
    """In float32, and negated in memory where a view negates."""
    return tensor.float().resolve_neg()


def run(
    x: Tensor,
    modulations: Sequence[Tensor],
    weights: HeadWeights,
    steps: Sequence[StepCoefficients],
    noise: Tensor | None = None,
    outside: Tensor | None = None,
    kernel: int = 0,
) -> Tensor:
    """Tokens after some steps, all with the same number of passes.

    Args:
        x: (batch, tokens, token_dim) in one of `DTYPES`.
        modulations: of each block (len(steps), passes, batch, tokens, 3 * width): 1 + scale, shift,
            gate; then (..., 2 * width) of the head.
        weights: of the MLP.
        noise: (len(steps), batch, tokens, token_dim), where steps add noise.
        outside: must be None or without effect, see `obstacle`.
        kernel: index in `extension().kernels()`; 0 is the best that this CPU runs.

    Raises:
        BackendError: there is no extension.
    """
    module = extension()
    packed = weights.packed if kernel == 0 else pack(weights, kernel)
    *block_modulations, head_modulation = [tensor.float().contiguous() for tensor in modulations]
    noise = None if noise is None else noise.float().contiguous()
    # A copy, which the kernel changes.
    result = x.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    batch, tokens, token_dim = x.shape
    arguments = {
        "tokens": batch * tokens,
        "passes": head_modulation.shape[1],
        "width": weights.width,
        "token_dim": token_dim,
        "steps": [step.as_list() for step in steps],
        "embed": _addresses(packed["embed"]),
        "head": _addresses(packed["head"]),
        "blocks": [
            {
                **{name: _addresses(linear) for name, linear in block.items()},
                "modulation": modulation.data_ptr(),
            }
            for block, modulation in zip(packed["blocks"], block_modulations, strict=True)
        ],
        "head_modulation": head_modulation.data_ptr(),
        "noise": 0 if noise is None else noise.data_ptr(),
        "x": result.data_ptr(),
    }
    module.denoise(arguments, kernel, torch.get_num_threads(), openmp_parallel())
    return result.to(x.dtype)


def _addresses(tensors: Linear) -> tuple[int, int]:
    weight, bias = tensors
    return weight.data_ptr(), bias.data_ptr()
