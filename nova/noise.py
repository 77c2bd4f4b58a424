"""Random draws of a run, in the reference's order, from one generator or one a sample."""

import copy
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import InputError

Generators = torch.Generator | Sequence[torch.Generator] | None

# Bytes of draws that may be on their way to the GPU; enough for several sets of a large batch.
MAX_BYTES_ON_THE_WAY = 64 << 20


class NoiseSource:
    """Draws random tensors whose first axis is the batch.

    With one generator the whole batch is drawn at once, as the reference does. With a list, every
    sample draws from its own, so that a sample does not depend on what else is in the batch.
    Generators may live on another device than the result (a CPU generator gives the same noise on
    any GPU).

    Args:
        generator: one, a list of `batch_size`, or None for torch's default.
        dtype, device: of the results. Draws are made in `dtype`.

    Raises:
        InputError: a list of another length than the batch, or something else than a generator.
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
        for one in self._generators:
            if one is not None and not isinstance(one, torch.Generator):
                raise InputError(
                    f"generator must be a torch.Generator, such as torch.Generator()"
                    f".manual_seed(0), or a list of them, got {one!r}"
                )
        self._batch_size = batch_size
        self._dtype = dtype
        self._device = device
        self._rows = slice(None)
        self._transfer = PinnedTransfer(device) if device.type == "cuda" else None

    def uniform(self, *shape: int) -> Tensor:
        """(batch_size, *shape) from [0, 1)."""
        return self._draw(shape, lambda x, generator: x.uniform_(generator=generator))

    def normal(self, *shape: int) -> Tensor:
        """(batch_size, *shape) from the standard normal distribution."""
        return self._draw(shape, lambda x, generator: x.normal_(generator=generator))

    def states(self) -> list[Tensor]:
        """Where the generators are now, for `part`."""
        return [_state(generator, self._device) for generator in self._generators]

    def part(self, start: int, stop: int, states: list[Tensor]) -> "NoiseSource":
        """The draws of samples start .. stop - 1 alone, equal to those in the whole batch.

        Where every sample has a generator of its own, the others stay where they are. A generator
        that several samples share draws for the whole batch, and the part is picked from that.

        Args:
            states: of `states`, where the draws begin; the generators that draw are put there.
        """
        part = copy.copy(self)
        if len({id(generator) for generator in self._generators}) == self._batch_size:
            part._generators = self._generators[start:stop]
            part._batch_size = stop - start
            states = states[start:stop]
        else:
            part._rows = slice(start, stop)
        for generator, state in zip(part._generators, states, strict=True):
            _set_state(generator, state, self._device)
        return part

    def _draw(self, shape: tuple[int, ...], fill) -> Tensor:
        rows = self._batch_size // len(self._generators)
        draws = []
        for generator in self._generators:
            device = self._device if generator is None else generator.device
            if self._transfer is not None and device.type == "cpu":
                x = torch.empty(rows, *shape, dtype=self._dtype, device=device, pin_memory=True)
                draws.append(self._transfer.send(fill(x, generator)))
            else:
                x = torch.empty(rows, *shape, dtype=self._dtype, device=device)
                draws.append(fill(x, generator).to(self._device))
        whole = draws[0] if len(draws) == 1 else torch.cat(draws)
        return whole[self._rows]


class PinnedTransfer:
    """Sends draws to a GPU without waiting for it, which would otherwise idle during the next ones.

    It waits only where more than `MAX_BYTES_ON_THE_WAY` have not arrived.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._arrivals: deque[tuple[int, torch.cuda.Event]] = deque()
        self._bytes = 0

    def send(self, x: Tensor) -> Tensor:
        """A copy on the GPU of `x`, which lies in pinned memory and may be dropped at once."""
        # torch keeps the memory of `x` until it is copied.
        sent = x.to(self._device, non_blocking=True)
        arrival = torch.cuda.Event()
        arrival.record(torch.cuda.current_stream(self._device))
        self._arrivals.append((x.nbytes, arrival))
        self._bytes += x.nbytes
        while self._bytes > MAX_BYTES_ON_THE_WAY:
            size, arrival = self._arrivals.popleft()
            arrival.synchronize()
            self._bytes -= size
        return sent


def _state(generator: torch.Generator | None, device: torch.device) -> Tensor:
    """The state of a generator, or of torch's default one for a device."""
    if generator is not None:
        return generator.get_state()
    if device.type == "cuda":
        return torch.cuda.get_rng_state(device)
    return torch.mps.get_rng_state() if device.type == "mps" else torch.get_rng_state()


def _set_state(generator: torch.Generator | None, state: Tensor, device: torch.device) -> None:
    if generator is not None:
        generator.set_state(state)
    elif device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    elif device.type == "mps":
        torch.mps.set_rng_state(state)
    else:
        torch.set_rng_state(state)
