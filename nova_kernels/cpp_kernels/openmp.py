"""The OpenMP library that torch's own operators run on.

Its threads keep a core busy for some milliseconds after each operator, waiting for the next one.
Threads made beside them would share these cores with them; so kernels run on the same threads.
"""

import ctypes
import sys
from functools import cache

import torch


@cache
def openmp_parallel() -> int:
    """Address of its function GOMP_parallel; 0 where torch runs on something else."""
    if "OpenMP" not in torch.__config__.parallel_info() or sys.platform != "linux":
        return 0
    try:
        # Looked for among the libraries that torch needs: others may have brought their own.
        function = ctypes.CDLL(torch._C.__file__).GOMP_parallel
    except (OSError, AttributeError):
        return 0
    return ctypes.cast(function, ctypes.c_void_p).value or 0
