"""The fastest of several ways to compute the same, found by a short measurement."""

from .tuner import tune

__all__ = ["tune"]
