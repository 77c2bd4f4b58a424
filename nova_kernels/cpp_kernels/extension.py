"""The compiled module of the kernels for CPUs."""

from types import ModuleType

from nova_kernels import compiled

NAME = "nova_kernels._cpp"
# Tried once: torch.compile cannot trace an import.
_OBSTACLE = compiled.obstacle(NAME, "C++", "a C++ compiler")


def obstacle() -> str | None:
    """Why there is no compiled module; None if there is."""
    return _OBSTACLE


def extension() -> ModuleType:
    """The compiled module.

    Raises:
        BackendError: it is not there.
    """
    return compiled.load(NAME, obstacle())
