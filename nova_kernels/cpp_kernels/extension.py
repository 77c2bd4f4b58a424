"""The compiled module of the kernels for CPUs."""

import importlib
from types import ModuleType

from nova_kernels.errors import BackendError

NAME = "nova_kernels._cpp"


def obstacle() -> str | None:
    """Why there is no compiled module; None if there is."""
    try:
        importlib.import_module(NAME)
    except ImportError as error:
        return (
            f"the C++ extension is not there ({error}); install nova-kernels where a C++ compiler "
            "is found, and see python -m nova_kernels --build"
        )
    return None


def extension() -> ModuleType:
    """The compiled module.

    Raises:
        BackendError: it is not there.
    """
    reason = obstacle()
    if reason is not None:
        raise BackendError(reason)
    return importlib.import_module(NAME)
