"""Exponential moving average of weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class EMA:
    """A float32 average of the trainable parameters of a module, kept outside of it.

    Args:
        module: as it is trained, wrapped for several processes or not; the average starts at its
            weights.
        decay: share of the average that a step keeps.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.shadow = [p.detach().float().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """shadow += (1 - d) (weights - shadow), with d = min(decay, (1 + step) / (10 + step))."""
        # A long memory of the random start would last thousands of steps.
        decay = min(self.decay, (1 + step) / (10 + step))
        for shadow, parameter in zip(self.shadow, self.parameters, strict=True):
            shadow.lerp_(parameter.detach().float(), 1 - decay)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Inside, the module has the averaged weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for shadow, parameter in zip(self.shadow, self.parameters, strict=True):
            current = parameter.detach().float().clone()
            parameter.copy_(shadow)
            shadow.copy_(current)
