"""Pillow and PyAV: imported where they are needed, and set up alike for reading and writing."""

import importlib
from types import ModuleType
from typing import Any

from ..errors import dependency_error


def require(module: str) -> ModuleType:
    """Import a module of Pillow or PyAV, or say how to install it.

    Raises:
        DependencyError: it cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = "pillow" if module.startswith("PIL") else "av"
        raise dependency_error(
            f"reading and writing images and videos needs {package}",
            module.partition(".")[0],
            f"pip install {package}",
            error,
        ) from error


def accurate_conversion(reformatter: ModuleType) -> Any:
    """Flags for RGB <-> YUV; the default ones darken every colour by a level or two."""
    flags = reformatter.Interpolation
    if not hasattr(flags, "ACCURATE_RND"):  # PyAV 17
        return flags.BICUBIC
    return flags.BICUBIC | flags.ACCURATE_RND | flags.FULL_CHR_H_INT
