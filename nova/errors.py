"""The package's own errors: whatever bad input causes is a `NovaError` that says what to do.

Each kind also derives from the builtin exception that fits it, so that `except ValueError` and the
like keep working.
"""

from nova_kernels.errors import in_a_line


class NovaError(Exception):
    """Base of all errors that this package raises on purpose."""


class InputError(NovaError, ValueError):
    """An argument of a call is wrong: shape, range, empty prompt list, steps below one..."""


class ConfigError(NovaError, ValueError):
    """A configuration has missing, unknown or contradicting entries."""


class CheckpointError(NovaError, ValueError):
    """A checkpoint folder or weight file is missing, malformed, truncated, or does not fit."""


class MediaError(NovaError, OSError):
    """An image or video cannot be read, or an output cannot be written."""


class DeviceError(NovaError, RuntimeError):
    """The device asked for is absent or out of memory."""


class DependencyError(NovaError, ImportError):
    """An optional library is needed for this call, and is not installed or cannot be imported."""


def dependency_error(need: str, module: str, install: str, error: ImportError) -> DependencyError:
    """What to raise where importing a library failed.

    Args:
        need: what needs which library, such as "training needs accelerate".
        module: the library's module.
        install: the command that installs it, which is no help where it is there.
        error: of the import.
    """
    if isinstance(error, ModuleNotFoundError) and error.name == module:
        return DependencyError(f"{need}: {install}")
    return DependencyError(f"{need}, which is installed but cannot be imported: {in_a_line(error)}")
