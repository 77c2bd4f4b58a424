"""In which order samples are used, and which process takes which."""

import torch

from ..errors import InputError
from .seeds import keyed_generator

_PURPOSE = 1  # keeps the shuffling apart from other draws of the same seed


class ShuffledOrder:
    """An endless sequence of sample indices: one random permutation after the other.

    Position p is in epoch p // length, whose permutation depends on (seed, epoch) alone, so that a
    run can go on from any position. Every epoch has every sample exactly once.
    """

    def __init__(self, length: int, seed: int):
        if length < 1:
            raise InputError("the data set has no samples")
        self.length = length
        self.seed = seed
        self._epoch = -1
        self._permutation: list[int] = []

    def __getitem__(self, position: int) -> int:
        """The sample at `position` of the sequence, 0 and on."""
        epoch, offset = divmod(position, self.length)
        if epoch != self._epoch:
            generator = keyed_generator(self.seed, _PURPOSE, epoch)
            self._permutation = torch.randperm(self.length, generator=generator).tolist()
            self._epoch = epoch
        return self._permutation[offset]


def split_step(
    first: int, batch_size: int, micro_batch_size: int, rank: int, world_size: int
) -> list[list[int]]:
    """The micro-batches of one process in one optimiser step.

    The step takes the positions first .. first + batch_size - 1, whatever the number of processes
    and the size of micro-batches: these only say who computes what, and when.

    Returns:
        A list of lists of `micro_batch_size` positions.

    Raises:
        InputError: batch_size is no multiple of micro_batch_size * world_size.
    """
    together = micro_batch_size * world_size
    if micro_batch_size < 1 or batch_size < 1 or batch_size % together:
        raise InputError(
            f"a batch of {batch_size} cannot be split into micro-batches of {micro_batch_size} on "
            f"{world_size} processes: it must be a multiple of {together}"
        )
    starts = range(first + rank * micro_batch_size, first + batch_size, together)
    return [list(range(start, start + micro_batch_size)) for start in starts]
