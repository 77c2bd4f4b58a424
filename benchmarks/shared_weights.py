"""A second model object with the weights of the first, to change how it runs and not the first."""

from typing import TypeVar

import torch

from nova.model import NOVATransformer

Model = TypeVar("Model", bound=NOVATransformer)


def share_weights(model: NOVATransformer, kind: type[Model] = NOVATransformer) -> Model:
    """A model of class `kind` with the same tensors (not copies), backends and libraries.

    Args:
        kind: `NOVATransformer`, or a subclass that takes no other arguments.
    """
    with torch.device("meta"):
        twin = kind(model.config)
    twin.load_state_dict(model.state_dict(), assign=True)
    for module, ours in zip(twin.modules(), model.modules(), strict=True):
        for name in ("backend", "kernel_library"):
            if hasattr(ours, name):
                setattr(module, name, getattr(ours, name))
    return twin.eval().requires_grad_(False)
