"""What users put around a model's layers: torch.compile, hooks, adapters, quantised weights.

Everything else asks here whether a layer is as this package made it, and what to write to a file.
"""

from torch import Tensor, nn

from .errors import CheckpointError

# Where torch.compile(module), unlike module.compile(), keeps the module that it wraps.
_COMPILED = "_orig_mod"


def uncompiled(module: nn.Module) -> nn.Module:
    """The module inside of what `torch.compile(module)` returns; any other as it is."""
    return module._modules.get(_COMPILED, module)


def is_altered(module: nn.Module) -> bool:
    """Whether somebody listens to a module's calls, or has replaced its `forward`."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    if _COMPILED in module._modules:
        return bool(hooks)  # its forward computes the same
    # Not vars(module), which torch.compile of torch 2.8 and older does not trace.
    return bool(hooks) or "forward" in module.__dict__


def is_plain(layer: nn.Module, kind: type[nn.Module] = nn.Linear, *, has_bias: bool = True) -> bool:
    """Whether a layer is torch's `kind`, and nobody replaced a part of it or listens.

    Only of such layers may weight and bias be used past the layer itself: adapters, quantised
    weights and hooks would be passed over.
    """
    return (
        type(layer) is kind
        and type(layer.weight) in (Tensor, nn.Parameter)
        and (layer.bias is not None) == has_bias
        and not is_altered(layer)
    )


def named_weights(module: nn.Module) -> dict[str, Tensor]:
    """A module's parameters and buffers by name, torch.compile's own names left out of these.

    The tensors are the module's own, not detached.
    """
    tensors = module.state_dict(keep_vars=True)
    return {name.replace(f"{_COMPILED}.", ""): tensor for name, tensor in tensors.items()}


def weights_to_save(module: nn.Module, fresh: nn.Module, what: str) -> dict[str, Tensor]:
    """A module's weights, if a folder with them and its config opens again.

    Args:
        fresh: one of the same config, as opening the folder makes it; may be on the meta device.
        what: the module, for messages.

    Raises:
        CheckpointError: adapters or quantised layers brought other names, shapes or kinds.
    """
    weights, expected = named_weights(module), fresh.state_dict()
    others = weights.keys() ^ expected.keys() or {
        name
        for name, tensor in weights.items()
        if tensor.shape != expected[name].shape or type(tensor) not in (Tensor, nn.Parameter)
    }
    if others:
        raise CheckpointError(
            f"{what} has layers that were wrapped, replaced or quantised ({min(others)}); a folder "
            "with their weights would not open again. Merge adapters into the weights or take them "
            "off, and save before quantising"
        )
    return weights
