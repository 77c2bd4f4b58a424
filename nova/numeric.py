"""Checks of arguments that are numbers."""

import math
import operator
from numbers import Real
from typing import Any

from .errors import InputError


def is_finite_number(value: Any) -> bool:
    """Whether it is a finite real number, Python's or NumPy's; truth values are none."""
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


def checked_count(name: str, value: Any, *, least: int) -> int:
    """A whole number as Python's, which files can hold.

    Raises:
        InputError: it is none, or below `least`.
    """
    number = whole_number(value)
    if number is None or number < least:
        raise InputError(f"{name} must be a whole number of at least {least}, got {value!r}")
    return number


def check_multiples(height: int, width: int, factor: int) -> None:
    """Raise InputError unless a VAE whose latents stand for `factor` pixels takes this size."""
    if height % factor or width % factor:
        nearest = [max(round(size / factor), 1) * factor for size in (height, width)]
        raise InputError(
            f"height and width must be multiples of {factor} for this VAE, for example "
            f"{nearest[0]} x {nearest[1]}; got {height} x {width}"
        )


def check_whole(options: Any, *names: str, least: int) -> None:
    """Raise InputError unless these attributes of a frozen dataclass are whole numbers.

    NumPy's become Python's, which files can hold.
    """
    for name in names:
        object.__setattr__(options, name, checked_count(name, getattr(options, name), least=least))


def check_finite(options: Any, *names: str, least: float = -math.inf) -> None:
    """The same for finite numbers, which become floats."""
    for name in names:
        value = getattr(options, name)
        if not is_finite_number(value) or value < least:
            limit = "" if least == -math.inf else f" of at least {least}"
            raise InputError(f"{name} must be a finite number{limit}, got {value!r}")
        object.__setattr__(options, name, float(value))
