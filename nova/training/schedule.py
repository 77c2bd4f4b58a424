"""Learning rate and mask ratio of a step."""

import math
from statistics import NormalDist

import torch

from .options import RunOptions


def learning_rate(step: int, options: RunOptions) -> float:
    """Learning rate of optimiser step `step` (0 is the first): warm-up, then the schedule.

    The cosine is at min_learning_rate at step `options.steps`, one after the last, as in the
    reference.
    """
    peak, warmup = options.learning_rate, options.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    if options.schedule == "constant":
        return peak
    lowest = min(options.min_learning_rate, peak)
    done = (step - warmup) / max(options.steps - warmup, 1)
    return lowest + (peak - lowest) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def draw_mask_ratio(
    generator: torch.Generator, mean: float = 1.0, std: float = 0.25, low: float = 0.7
) -> float:
    """One draw from the normal distribution (mean, std), truncated to [low, 1]."""
    normal = NormalDist(mean, std)
    lowest, highest = normal.cdf(low), normal.cdf(1.0)
    uniform = torch.rand((), generator=generator, dtype=torch.float64).item()
    quantile = lowest + uniform * (highest - lowest)
    return min(max(normal.inv_cdf(quantile), low), 1.0)
