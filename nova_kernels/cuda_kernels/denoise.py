"""All steps of the denoise loop in one launch (csrc/denoise.cuh)."""

from collections.abc import Sequence
from functools import cache
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from nova_kernels.cuda_kernels.denoise_plan import (
    CLUSTER_SIZES,
    DenoisePlan,
    DenoiseShape,
    DeviceLimits,
    obstacle_of_memory,
    plan_denoise,
)
from nova_kernels.cuda_kernels.denoise_plan import obstacle as obstacle_of_shape
from nova_kernels.cuda_kernels.extension import dtype_of, extension, stream_of
from nova_kernels.errors import BackendError
from nova_kernels.head_weights import HeadWeights, Linear
from nova_kernels.ops.denoise import Outside
from nova_kernels.ops.diffusion_step import StepCoefficients

DTYPES = (torch.float16, torch.bfloat16)
ALIGNMENT = 16
# The layers whose products are made before the loop: cuBLAS has them.
linear = F.linear


def obstacle(
    x: Tensor,
    condition: Tensor,
    weights: HeadWeights,
    steps: Sequence[StepCoefficients],
    outside: Outside | None,
) -> str | None:
    """Why the kernel cannot run a call of `nova_kernels.denoise`; None if it can."""
    shape = shape_of(x, condition, weights)
    tensors = [x, condition, *weights.tensors()]
    if {t.dtype for t in tensors} - {x.dtype} or x.dtype not in DTYPES:
        names = sorted({str(t.dtype) for t in tensors})
        return f"it takes float16 or bfloat16, the same for tokens and weights, got {names}"
    if outside is not None and outside.noise is not None:
        return "renormalised guidance with noise outside of the set needs a sequence of launches"
    reason = obstacle_of_shape(shape)
    if reason is None and x.is_cuda and _plan(extension(), shape, x.device, x.dtype) is None:
        limits = device_limits(extension(), x.device, x.dtype, shape.passes)
        reason = obstacle_of_memory(shape, limits)
    return reason


def run(
    x: Tensor,
    modulations: Sequence[Tensor],
    weights: HeadWeights,
    steps: Sequence[StepCoefficients],
    noise: Tensor | None = None,
    outside: Tensor | None = None,
    plan: DenoisePlan | None = None,
    module: ModuleType | None = None,
) -> Tensor:
    """Tokens after some steps, all with the same number of passes.

    Args:
        x: (batch, tokens, token_dim) float16 or bfloat16.
        modulations: of each block (len(steps), passes, batch, tokens, 3 * width): 1 + scale, shift,
            gate; then (..., 2 * width) of the head.
        weights: of the MLP.
        steps: at most `extension().MAX_DENOISE_STEPS`.
        noise: (len(steps), batch, tokens, token_dim), where steps add noise.
        outside: (batch,) float32 squared norms for renormalised guidance; updated in place.
        plan: the division among blocks; None: made for the GPU of x.
        module: the extension, or what stands in for it.

    Raises:
        BackendError: there is no extension, or the GPU cannot run the kernel.
    """
    module = module or extension()
    batch, tokens, token_dim = x.shape
    passes = modulations[0].shape[1]
    width, depth = weights.width, len(weights.blocks)
    shape = DenoiseShape(batch * tokens, passes, width, depth, token_dim)
    plan = plan or _plan(module, shape, x.device, x.dtype)
    if plan is None:
        raise BackendError(
            f"denoise: {torch.cuda.get_device_name(x.device)} cannot run all blocks of a width of "
            f"{width} at the same time; use backend='triton' or 'reference'"
        )
    out, x = torch.empty_like(x, memory_format=torch.contiguous_format), x.contiguous()
    layers = [layer for block in weights.blocks for layer in (block.fc1, block.fc2)]
    norms = [block.norm for block in weights.blocks]
    scratch = {
        "normed": x.new_empty(shape.rows, width),
        "hidden": x.new_empty(shape.rows, width),
        "branch": x.new_empty(shape.rows, width, dtype=torch.float32),
        "squares": x.new_empty(shape.tokens, 2, dtype=torch.float32),
        "arrivals": x.new_empty(1, dtype=torch.int32),
    }
    single = {
        "x": x,
        "out": out,
        "noise": noise if noise is None else noise.contiguous(),
        "outside": outside,
        **_linear("embed", weights.embed),
        **_linear("head", weights.head),
        **scratch,
    }
    several = {
        "layer_weight": [_aligned(weight) for weight, _ in layers],
        "layer_bias": [_aligned(bias) for _, bias in layers],
        "norm_weight": [_aligned(weight) for weight, _ in norms],
        "norm_bias": [_aligned(bias) for _, bias in norms],
        "modulation": [_aligned(modulation) for modulation in modulations],
    }
    arguments = module.DenoiseArguments()
    arguments.dtype = dtype_of(module, x.dtype)
    arguments.tokens_per_sample = tokens
    for name, size in {**vars(shape), **vars(plan)}.items():
        setattr(arguments, name, size)
    for name, tensor in single.items():
        setattr(arguments, name, 0 if tensor is None else tensor.data_ptr())
    for name, tensors in several.items():
        setattr(arguments, name, [tensor.data_ptr() for tensor in tensors])
    arguments.set_numbers([step.as_list() for step in steps])
    with torch.cuda.device_of(x):
        module.denoise(arguments, stream_of(x))
    return out


def shape_of(x: Tensor, condition: Tensor, weights: HeadWeights) -> DenoiseShape:
    """Sizes of a call of `nova_kernels.denoise`."""
    batch, tokens, token_dim = x.shape
    depth = len(weights.blocks)
    return DenoiseShape(batch * tokens, condition.shape[0], weights.width, depth, token_dim)


def _linear(name: str, linear: Linear) -> dict[str, Tensor]:
    weight, bias = linear
    return {f"{name}_weight": _aligned(weight), f"{name}_bias": _aligned(bias)}


def _aligned(tensor: Tensor) -> Tensor:
    """Contiguous, at an address that 16-byte accesses take."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


@cache
def _plan(
    module: ModuleType, shape: DenoiseShape, device: torch.device, dtype: torch.dtype
) -> DenoisePlan | None:
    """Made once for the sets of a size, since it is asked for twice at every set."""
    return plan_denoise(shape, device_limits(module, device, dtype, shape.passes))


@cache
def device_limits(
    module: ModuleType, device: torch.device, dtype: torch.dtype, passes: int
) -> DeviceLimits:
    """Asked of the driver, as some multiprocessors are left over when they are grouped."""
    # First, since it raises what is wrong where the extension has no GPU, whose list is empty then.
    with torch.cuda.device(device):
        clusters = {
            size: module.denoise_clusters(dtype_of(module, dtype), passes, size)
            for size in CLUSTER_SIZES
        }
    # Not of torch, which tells it from 2.7 on.
    shared_bytes = module.devices()[device.index]["shared_memory_per_block_optin"]
    return DeviceLimits(clusters, shared_bytes)
