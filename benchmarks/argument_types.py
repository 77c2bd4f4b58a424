"""Types of command-line arguments, for argparse. Without torch, which not every process loads."""

import argparse
import math


def positive_int(text: str) -> int:
    """A whole number of at least 1."""
    return _at_least_one(text, f"{text!r} is no whole number of at least 1")


def positive_ints(text: str) -> list[int]:
    """Whole numbers of at least 1, such as "2,11"."""
    error = f"{text!r} is no list of whole numbers of at least 1, such as 2,11"
    return [_at_least_one(number, error) for number in text.split(",")]


def positive_float(text: str) -> float:
    """A finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no finite number above 0")
    return number


def _at_least_one(text: str, error: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(error)
    return number
