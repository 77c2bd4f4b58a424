"""NOVA: autoregressive video generation without vector quantisation, exact and fast.

`import nova` is light: the model needs torch and numpy alone, and transformers, diffusers, Pillow
and PyAV are imported when a checkpoint, a VAE or a media file asks for them.
"""

from importlib import import_module
from typing import Any

from .errors import (
    CheckpointError,
    ConfigError,
    DependencyError,
    DeviceError,
    InputError,
    MediaError,
    NovaError,
)

__version__ = "0.1.0"

# Public names and the modules that hold them, imported at first use.
_LAZY = {
    "accelerate": "acceleration",
    "report": "acceleration",
    "restore": "acceleration",
    "CausalVideoVAE": "vae",
    "Guidance": "guidance",
    "LatentCodec": "codec",
    "ModelConfig": "config",
    "NOVAPipeline": "pipeline",
    "NOVAPipelineOutput": "outputs",
    "NOVATransformer": "model",
    "Request": "request",
    "TextEncoder": "text",
    "VAEConfig": "vae",
    "named_config": "config",
    "tune": "tuning",
}

__all__ = [
    "CausalVideoVAE",
    "CheckpointError",
    "ConfigError",
    "DependencyError",
    "DeviceError",
    "Guidance",
    "InputError",
    "LatentCodec",
    "MediaError",
    "ModelConfig",
    "NOVAPipeline",
    "NOVAPipelineOutput",
    "NOVATransformer",
    "NovaError",
    "Request",
    "TextEncoder",
    "VAEConfig",
    "accelerate",
    "named_config",
    "report",
    "restore",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'nova' has no attribute {name!r}")
    return getattr(import_module(f".{_LAZY[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
