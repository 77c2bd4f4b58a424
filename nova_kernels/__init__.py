"""Kernels of NOVA video models: a plain-torch reference of every op, and faster versions of it.

    import nova_kernels
    y = nova_kernels.scale_shift(x, scale, shift)

Importing this package imports neither torch nor Triton; an op's first use does.
"""

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import Any

try:
    __version__ = version("nova-kernels")
except PackageNotFoundError:  # used from a folder, without having been installed
    __version__ = "unknown"

# Public name -> module that has it.
_MODULES = {
    "scale_shift": "nova_kernels.ops.scale_shift",
    "frame_scale_shift": "nova_kernels.ops.frame_scale_shift",
    "residual_norm": "nova_kernels.ops.residual_norm",
    "linear_gelu": "nova_kernels.ops.linear_gelu",
    "rope3d": "nova_kernels.ops.rope3d",
    "rotate_heads": "nova_kernels.ops.rope3d",
    "diffusion_step": "nova_kernels.ops.diffusion_step",
    "denoise": "nova_kernels.ops.denoise",
    "BlockWeights": "nova_kernels.head_weights",
    "HeadWeights": "nova_kernels.head_weights",
    "Outside": "nova_kernels.ops.denoise",
    "StepCoefficients": "nova_kernels.ops.diffusion_step",
    "block_causal_attention": "nova_kernels.ops.block_causal_attention",
    "report": "nova_kernels.reporting",
    "build_info": "nova_kernels.build",
    "BackendError": "nova_kernels.errors",
}

__all__ = ["__version__", *_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
