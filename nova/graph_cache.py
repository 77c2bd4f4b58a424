"""What is recorded for one part of sampling, kept from run to run."""

import warnings
from collections.abc import Callable, Hashable, Sized
from functools import cache
from typing import Generic, TypeVar

from torch import Tensor, nn

from nova_kernels.dispatch import requested

from .altered_layers import is_altered
from .graph_recording import Recorder, RecordingError
from .model import NOVATransformer

Recorded = TypeVar("Recorded", bound=Sized)
_PLAIN = (Tensor, nn.Parameter, type(None))  # a layer without bias has None


class GraphWarning(UserWarning):
    """Something is sampled without CUDA graphs from now on."""


class GraphCache(Generic[Recorded]):
    """The graphs of one part of sampling, for one kind of run at a time; another drops them.

    Args:
        name: of the part, for messages.
        record: what records.

    Attributes:
        name: as given.
        failure: why it is no longer recorded; None as long as it is.
    """

    def __init__(self, name: str, record: Recorder):
        self.failure: str | None = None
        self.name, self._record = name, record
        self._key: Hashable = None
        self._recorded: Recorded | None = None

    def __len__(self) -> int:
        """Number of graphs."""
        return 0 if self._recorded is None else len(self._recorded)

    def get(self, key: Hashable, make: Callable[[Recorder], Recorded]) -> Recorded:
        """What is recorded for runs of the kind `key`, made anew if the last was of another."""
        if self._recorded is None or key != self._key:
            # The old ones go first: there may not be memory for both.
            self._recorded = None
            self._recorded = make(self._record)
            self._key = key
        return self._recorded

    def clear(self) -> None:
        """Drop all graphs and their memory; a failure is forgotten too."""
        self._key, self._recorded, self.failure = None, None, None

    def give_up(self, reason: str) -> None:
        """Record no more, and say so."""
        self.clear()
        self.failure = reason
        warnings.warn(
            f"CUDA graphs of the {self.name} are off, sampling goes on without them: {reason}",
            GraphWarning,
            stacklevel=2,
        )


def weights_key(model: NOVATransformer) -> Hashable:
    """What graphs depend on in a model: where its weights are, and which kernels it runs by.

    Asked twice a frame, while the GPU waits, so it is written to be quick.

    Raises:
        RecordingError: parts of it may do something else each time, which replays would not follow.
    """
    kernels, weights = [], []
    for name, module in model.named_modules():
        _check_fixed(name, module)
        own = vars(module)
        if "backend" in own:
            kernels.append(requested(module.backend))
        if "kernel_library" in own:
            kernels.append(module.kernel_library)
        # Strides too: a weight in another layout may come to lie where one was before.
        weights += [
            (p.data_ptr(), p.stride()) for p in own["_parameters"].values() if p is not None
        ]
    return model.has_compiled_blocks, tuple(kernels), tuple(weights)


def _check_fixed(name: str, module: nn.Module) -> None:
    """Raises RecordingError where more than weights may decide what a module computes."""
    if not _is_of_torch_or_nova(type(module)):
        reason = f"is a {type(module).__name__}"
    elif is_altered(module):
        reason = "has hooks"
    elif not all(type(p) in _PLAIN for p in module._parameters.values()):
        reason = "has weights of a kind of their own"
    else:
        return
    raise RecordingError(f"{name or 'the model'} {reason}, whose changes replays would not follow")


@cache
def _is_of_torch_or_nova(kind: type[nn.Module]) -> bool:
    """Adapters and parametrisations are modules of other packages or of other parts of torch."""
    return f"{kind.__module__}.".startswith((f"{__package__}.", "torch.nn.modules."))
