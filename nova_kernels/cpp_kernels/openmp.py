"""The OpenMP library that torch's own operators run on.

Its threads keep a core busy for some milliseconds after each operator, waiting for the next one.
Threads made beside them would share these cores with them; so kernels run on the same threads.
"""

import ctypes
from functools import cache
from pathlib import Path

import torch

_LOADED = Path("/proc/self/maps")
_NAMES = ("libgomp", "libiomp5", "libomp")


@cache
def openmp_parallel() -> int:
    """Address of its function GOMP_parallel; 0 where torch runs on something else."""
    if "OpenMP" not in torch.__config__.parallel_info() or not _LOADED.exists():
        return 0
    for line in _LOADED.read_text().splitlines():
        path = line.partition("/")[2]
        if path.startswith(_NAMES) or any(f"/{name}" in path for name in _NAMES):
            try:
                function = ctypes.CDLL(f"/{path}").GOMP_parallel
            except (OSError, AttributeError):
                continue
            return ctypes.cast(function, ctypes.c_void_p).value or 0
    return 0
