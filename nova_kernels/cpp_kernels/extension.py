"""The compiled module of the kernels for CPUs."""

from types import ModuleType

from nova_kernels import compiled

NAME = "nova_kernels._cpp"


def obstacle() -> str | None:
    """Why there is no compiled module; None if there is."""
    return compiled.obstacle(NAME, "C++", "a C++ compiler")


def extension() -> ModuleType:
    """The compiled module.

    Raises:
        BackendError: it is not there.
    """
    return compiled.load(NAME, obstacle())
