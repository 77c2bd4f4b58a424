"""Which arguments are numbers."""

import math
import operator
from numbers import Real
from typing import Any


def is_finite_number(value: Any) -> bool:
    """Whether it is a real number, Python's or NumPy's, but NaN, infinity or a truth value."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond the largest float
        return False


def whole_number(value: Any) -> int | None:
    """A whole number, Python's or NumPy's, as an int; None for anything else."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None
