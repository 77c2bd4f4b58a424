"""Kernels of NOVA video models: a plain-torch reference of every op, and faster versions of it.

Importing this package imports neither torch nor Triton.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("nova-kernels")
except PackageNotFoundError:  # used from a folder, without having been installed
    __version__ = "unknown"

__all__ = ["__version__"]
