"""Loading the compiled modules of this package, which an install may lack."""

import importlib
from types import ModuleType

from nova_kernels.errors import BackendError


def obstacle(name: str, title: str, compiler: str) -> str | None:
    """Why a compiled module is not there; None if it is.

    Args:
        name: of the module. title: what users call it. compiler: what builds it.
    """
    try:
        importlib.import_module(name)
    except ImportError as error:
        return (
            f"the {title} extension is not there ({error}); install nova-kernels where {compiler} "
            "is found, and see python -m nova_kernels --build"
        )
    return None


def load(name: str, reason: str | None) -> ModuleType:
    """The module.

    Args:
        reason: what `obstacle` says.

    Raises:
        BackendError: it is not there.
    """
    if reason is not None:
        raise BackendError(reason)
    return importlib.import_module(name)
