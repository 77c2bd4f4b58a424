"""Generators that depend on numbers alone, so that any draw of a run can be made again."""

import numpy as np
import torch


def keyed_generator(*key: int) -> torch.Generator:
    """A CPU generator seeded by whole numbers, such as (seed, step); other keys, other draws."""
    # Sums or products of the numbers would collide; SeedSequence mixes them.
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]) >> 1)
