"""Training: the transformer on encoded clips, the VAE on clips, a text encoder on captions.

`train`, `train_vae` and `make_text_encoder` are the whole interface; see docs/training.md.
"""

from importlib import import_module
from typing import Any

from .divergence import DivergenceError
from .options import RunOptions, TextEncoderOptions, TrainingOptions, VAETrainingOptions

# Imported at first use: a text encoder needs transformers, and the options need nothing.
_LAZY = {
    "CaptionLabels": "text_encoder",
    "FrozenParts": "checkpoints",
    "make_text_encoder": "text_encoder",
    "new_model": "initialization",
    "new_vae": "initialization",
    "train": "loop",
    "train_vae": "vae_loop",
}

__all__ = [
    "CaptionLabels",
    "DivergenceError",
    "FrozenParts",
    "RunOptions",
    "TextEncoderOptions",
    "TrainingOptions",
    "VAETrainingOptions",
    "make_text_encoder",
    "new_model",
    "new_vae",
    "train",
    "train_vae",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'nova.training' has no attribute {name!r}")
    return getattr(import_module(f".{_LAZY[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
