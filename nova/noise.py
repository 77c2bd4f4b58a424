"""Random draws of a run, in the reference's order, from one generator or one a sample."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import InputError

Generators = torch.Generator | Sequence[torch.Generator] | None


class NoiseSource:
    """Draws random tensors whose first axis is the batch.

    With one generator the whole batch is drawn at once, as the reference does. With a list, every
    sample draws from its own, so that a sample does not depend on what else is in the batch.
    Generators may live on another device than the result (a CPU generator gives the same noise on
    any GPU).

    Args:
        generator: one, a list of `batch_size`, or None for torch's default.
        dtype, device: of the results. Draws are made in `dtype`.
    """

    def __init__(
        self,
        generator: Generators,
        batch_size: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ):
        if isinstance(generator, Sequence):
            if len(generator) != batch_size:
                raise InputError(
                    f"a list of generators needs one for each of the {batch_size} samples "
                    f"(prompts x images a prompt), got {len(generator)}"
                )
            self._generators = list(generator)
        else:
            self._generators = [generator]
        self._batch_size = batch_size
        self._dtype = dtype
        self._device = device

    def uniform(self, *shape: int) -> Tensor:
        """(batch_size, *shape) from [0, 1)."""
        return self._draw(shape, lambda x, generator: x.uniform_(generator=generator))

    def normal(self, *shape: int) -> Tensor:
        """(batch_size, *shape) from the standard normal distribution."""
        return self._draw(shape, lambda x, generator: x.normal_(generator=generator))

    def _draw(self, shape: tuple[int, ...], fill) -> Tensor:
        rows = self._batch_size // len(self._generators)
        draws = []
        for generator in self._generators:
            device = self._device if generator is None else generator.device
            x = torch.empty(rows, *shape, dtype=self._dtype, device=device)
            draws.append(fill(x, generator).to(self._device))
        return draws[0] if len(draws) == 1 else torch.cat(draws)
