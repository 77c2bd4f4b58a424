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
    function = getattr(_library(), "GOMP_parallel", None)
    return ctypes.cast(function, ctypes.c_void_p).value or 0 if function else 0


@cache
def gives_all_threads() -> bool:
    """Whether as many threads run as torch asks for; OMP_DYNAMIC, OMP_THREAD_LIMIT may give fewer.

    Then torch's loops and the kernels here share the work among those that come, but oneDNN's
    products leave part of the result as memory was: those that are asked for by name, and those of
    torch's own layers in half precision (seen with torch 2.13).
    """
    library = _library()
    try:
        is_dynamic, limit = library.omp_get_dynamic(), library.omp_get_thread_limit()
    except AttributeError:  # of another kind
        return True
    return not is_dynamic and limit >= torch.get_num_threads()


@cache
def _library() -> ctypes.CDLL | None:
    if "OpenMP" not in torch.__config__.parallel_info() or sys.platform != "linux":
        return None
    try:
        # Looked for among the libraries that torch needs: others may have brought their own.
        return ctypes.CDLL(torch._C.__file__)
    except OSError:
        return None
